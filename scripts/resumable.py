"""Rows of a table over many networks, kept in a file from which an interrupted script goes on."""

import fnmatch
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def recorded(results: Path) -> dict[str, Row]:
    """The last row of each name in a file of `rows_of`; none where there is no file."""
    if not results.is_file():
        return {}
    return {row["name"]: row for row in map(json.loads, results.read_text().splitlines())}


def rows_of(
    names: Sequence[str],
    results: Path,
    examine: Callable[[str], Row],
    *,
    only: str = "*",
    seconds: float = float("inf"),
    stale: Callable[[Row], bool] = lambda row: False,
) -> list[Row]:
    """A row for each name, as far as there is one, in their order.

    Args:
        names: what the table is about; a row's "name".
        results: a JSON line a row, read first and added to.
        examine: makes the row of a name that has none.
        only: shell pattern of the names that are examined.
        seconds: nothing new is begun after so long.
        stale: whether a row is to be made anew; of a name's rows in the file the last counts.
    """
    done = recorded(results)
    start = time.monotonic()
    with results.open("a") as file:
        for name in names:
            known = name in done and not stale(done[name])
            if known or not fnmatch.fnmatch(name, only):
                continue
            if time.monotonic() - start > seconds:
                break
            done[name] = examine(name)
            file.write(json.dumps(done[name]) + "\n")
            file.flush()
    return [done[name] for name in names if name in done]
