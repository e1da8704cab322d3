"""`senet ablate`: the paper's ablations over one recipe and data set."""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from senet.cli.comparison import NO_COMPARISON, ComparisonFlags, telling_how_to_go_on
from senet.cli.tables import print_table
from senet.errors import UserError
from senet.support.collector import importing
from senet.support.progress import watch

if TYPE_CHECKING:
    from senet.experiments.ablate import AblateConfig, Variant


def ablate(
    ablation: Literal["reduction", "squeeze", "excitation", "stages", "integration", "nosqueeze"]
    | None = None,
    /,
    *,
    flags: ComparisonFlags = NO_COMPARISON,
) -> None:
    """Train the variants of one of the paper's ablations, and show them beside the paper's.

    All get the same recipe, data and seeds, so that each is compared seed by seed with the network
    without SE (squeeze, excitation, integration: with the paper's own). The folder holds a run for
    each variant and seed, and results.json. With the recipe quick, 4 epochs, reduction 4 and the
    gate identity_sigmoid hold where the ablation does not vary them.

    Args:
        ablation: reduction (table 10), squeeze (11), excitation (12: the gate), stages (13),
            integration (14 and 15), or nosqueeze (16).
    """
    flags.training.prepare_process()
    with importing():
        from senet.experiments.ablate import AblateConfig, run_ablation

    if ablation is None and flags.resume is None:
        raise UserError("name an ablation, such as: senet ablate reduction --out FOLDER")
    settings = flags.settings(AblateConfig, ablation=ablation)
    tell, continued = partial(print, flush=True), flags.resume is not None
    with telling_how_to_go_on(settings):
        found = run_ablation(settings, watch=watch, tell=tell, continued=continued)
    print_table(_table(settings, found))
    print(f"Runs and results.json: {settings.out}")


def _table(config: "AblateConfig", variants: "Sequence[Variant]") -> Table:
    """The variants, with the paper's SE-ResNet-50 on ImageNet beside them."""
    table = Table(title=f"{config.ablation}: {config.model}, {config.data}", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in (
        *("top-1 error %", f"minus {config.base}", "parameters", "multiply-adds"),
        *("paper: top-1 error %", "top-5", "parameters (M)"),
    ):
        table.add_column(column, justify="right")
    for variant in variants:
        spread = f" ± {statistics.stdev(variant.top1):.2f}" if len(variant.top1) > 1 else ""
        paper = variant.card.results[0]
        table.add_row(
            variant.label,
            f"{statistics.fmean(variant.top1):.2f}{spread}",
            "" if variant.difference is None else str(variant.difference),
            f"{variant.parameters:,}",
            f"{variant.multiply_adds:,}",
            f"{paper.top1:.2f}",
            "" if paper.top5 is None else f"{paper.top5:.2f}",
            variant.card.paper_parameters or "",
        )
    epochs = config.training_recipe().epochs
    base = ", ".join(f"{key} {value}" for key, value in config.se_options.items())
    table.caption = (
        f"mean ± sample standard deviation of {config.seeds} seeds after "
        f"{epochs} epoch{'s' if epochs > 1 else ''} of the recipe {config.recipe}"
        f"{'; SE options otherwise: ' + base if base else ''}.\n"
        f"minus {config.base}: mean of the differences seed by seed, and its 95% interval.\n"
        "Paper: SE-ResNet-50 on ImageNet, other training."
    )
    table.caption_justify = "left"
    return table
