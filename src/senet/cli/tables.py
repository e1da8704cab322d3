"""Tables for a terminal."""

import os
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from senet.support.console import PlainConsole

PIPE_WIDTH = 200


def new_table(*left: str, right: Sequence[str] = (), **options: Any) -> Table:
    """A table without rows: columns of text, then columns of numbers.

    Args:
        left: headers of the columns of text.
        right: headers of the columns of numbers, which are set right.
        **options: of `rich.table.Table`.
    """
    table = Table(**options)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, or as COLUMNS says.

    In a file or a pipe, which have no width, no column is cut.
    """
    console = PlainConsole()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    console.print(table)
