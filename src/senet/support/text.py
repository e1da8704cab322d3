"""Numbers and tables as people read them."""

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 200


def print_table(table: Table) -> None:
    """Print a table; in a file or a pipe, which have no width, no column is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(table)


def duration(seconds: float) -> str:
    """Seconds as people write them: `9.4 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: int) -> str:
    """A count with its unit prefix, four significant digits from a million on: `25.56 M`."""
    for scale, unit in ((10**9, "G"), (10**6, "M")):
        if value >= scale:
            return f"{value / scale:#.4g} {unit}"
    return f"{value:,}"
