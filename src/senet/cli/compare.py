"""`senet compare`: a network without SE against the same with it."""

from functools import partial
from typing import TYPE_CHECKING

from rich.table import Table

from senet.cli.comparison import NO_COMPARISON, ComparisonFlags, telling_how_to_go_on
from senet.cli.tables import new_table, print_table
from senet.support.collector import importing
from senet.support.progress import watch

if TYPE_CHECKING:
    from senet.reports.comparison import Comparison


def compare(*, flags: ComparisonFlags = NO_COMPARISON) -> None:
    """Train a network with and without SE alternately, and show what SE gained and cost.

    Both get the same recipe, data and seeds. A network of timm, torchvision or a file is compared
    with itself without its SE blocks. Prints a table and the paired difference with its
    95% interval; the folder holds a run for each network and seed, figures, results.json and
    report.html. With the recipe quick, 4 epochs, reduction 4 and the gate identity_sigmoid are
    the defaults of networks of this package.
    """
    flags.training.prepare_process()
    with importing():
        from senet.experiments.compare import CompareConfig, run_comparison
        from senet.reports.comparison import cost, verdict

    settings = flags.settings(CompareConfig)
    tell = partial(print, flush=True)
    with telling_how_to_go_on(settings):
        comparison = run_comparison(
            settings, watch=watch, tell=tell, resume=flags.resume is not None
        )
    print_table(comparison_table(comparison))
    print(cost(comparison))
    print(verdict(comparison))
    print(f"Runs, figures and report.html: {settings.out}")


def comparison_table(comparison: "Comparison") -> Table:
    """What the two networks cost and gave."""
    from senet.reports.comparison import caption, table_rows

    names = (comparison.plain.name, comparison.se.name)
    table = new_table("", right=names, caption=caption(comparison), caption_justify="left")
    for row in table_rows(comparison):
        table.add_row(*row)
    return table
