"""Tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

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
    """Print a table; in a file or a pipe, which have no width, no column is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(table)
