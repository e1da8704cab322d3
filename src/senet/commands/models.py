"""The networks there are and their sizes: a table, since counting them all takes half a minute."""

import csv
import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from senet.errors import UserError

if TYPE_CHECKING:
    from senet.weights.released import Released

# Counted by scripts/network_sizes.py.
TABLE = Path(__file__).with_name("networks.csv")


@dataclass(frozen=True)
class NetworkSize:
    """A network at its default input size.

    Attributes:
        name: in the registry.
        parameters: number of parameters.
        multiply_adds: of one image.
        input_size: (C,H,W).
    """

    name: str
    parameters: int
    multiply_adds: int
    input_size: tuple[int, ...]


def network_sizes(pattern: str = "*") -> list[NetworkSize]:
    """The networks whose names match a shell pattern, in natural order.

    Raises:
        UserError: no name matches.
    """
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    names = fnmatch.filter(rows, pattern)
    if not names:
        raise UserError(f"no model matches {pattern!r}; `senet models` lists all")
    return [
        NetworkSize(
            name,
            int(rows[name]["parameters"]),
            int(rows[name]["multiply_adds"]),
            tuple(map(int, rows[name]["input_size"].split("×"))),
        )
        for name in sorted(names, key=natural_order)
    ]


def released_weights(pattern: str = "*") -> "list[Released]":
    """The released weights that a shell pattern matches, by network, the best ones first.

    Args:
        pattern: of their names with our network's name or timm's, with the tag or without.

    Raises:
        UserError: no name matches.
    """
    from senet.weights.released import all_released  # PyTorch, which the table of networks need not

    found = [
        each
        for each in all_released()
        if any(
            fnmatch.fnmatch(name, pattern)
            for name in (each.network, f"{each.network}.{each.tag}", each.name)
        )
    ]
    if not found:
        raise UserError(
            f"no released weights match {pattern!r}; `senet models --pretrained` lists all"
        )
    return sorted(found, key=lambda each: natural_order(each.network))


def natural_order(name: str) -> tuple[list[int | str], bool]:
    """A plain network before its SE twin, and resnet20 before resnet110."""
    base = name.removeprefix("se_")
    parts = re.split(r"(\d+)", base)
    return [int(part) if part.isdigit() else part for part in parts], base != name
