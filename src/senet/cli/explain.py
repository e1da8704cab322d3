"""`senet explain`: what the gates of a checkpoint learned."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from senet.cli.options import (
    NO_EVALUATION,
    EvaluationFlags,
    OptionalWhole,
    Whole,
    given_network,
)
from senet.cli.tables import new_table, print_table
from senet.errors import UserError
from senet.support.collector import importing
from senet.support.progress import watch

if TYPE_CHECKING:
    from senet.gates.statistics import GateStatistics

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


def explain(
    checkpoint: Path | None = None,
    /,
    *,
    model: str | None = None,
    weights: Path | None = None,
    num_classes: OptionalWhole = None,
    flags: EvaluationFlags = NO_EVALUATION,
    out: Path | None = None,
    classes: Names = (),
    images: Whole = 400,
) -> None:
    """Record every gate over validation images and report what the SE blocks learned.

    Writes report.html (one file, opens without a network), the figures 6 and 7 of the paper as
    PNG and SVG, gates.csv, gates_by_class.csv, and statistics.safetensors for `senet fold`.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, or model.safetensors.
        model: instead of a checkpoint: torchvision:NAME, timm:NAME, or FILE.py:FUNCTION.
        weights: the model's own state dict as .safetensors or .pth, or the word pretrained for
            released ones (senet models --pretrained lists them; default: fresh weights); without
            --model a checkpoint.
        num_classes: outputs of the model, where they are not the classes of --data.
        out: folder to make (default: gates inside the run folder); it must not exist.
        classes: names of the classes to draw (default: evenly chosen).
        images: most images in the report.
    """
    flags.prepare_process()
    with importing():
        from senet.commands.explain import explain as explain_checkpoint

    path, name = given_network(checkpoint, model, weights)
    if out is None:
        if name is not None or path is None:
            raise UserError("--model has no run folder: give one to make by --out")
        out = (path if path.is_dir() else path.parent) / "gates"
    with watch() as progress:
        result = explain_checkpoint(
            path,
            out,
            model=name,
            num_classes=num_classes,
            classes=classes,
            images=images,
            **flags.arguments(),
            progress=progress,
        )
    print_table(_table(result.statistics))
    print(f"Figures, tables and report.html: {result.folder}")


def _table(statistics: "GateStatistics") -> Table:
    """A row a block."""
    right = (
        *(
            "stage",
            "channels",
            "hidden",
            "mean gate",
            "spread",
            "between classes (%)",
            "near 0/low (%)",
        ),
        "near 1/high (%)",
    )
    table = new_table("block", "gate", right=right)
    stage_of = {name: stage for stage, names in statistics.stages().items() for name in names}
    for block in statistics.blocks.values():
        ends = block.saturation
        table.add_row(
            block.name,
            block.gate,
            f"{stage_of[block.name]}",
            f"{block.channels:,}",
            "" if block.hidden is None else f"{block.hidden:,}",
            f"{float(block.mean.mean()):.3f}",
            f"{float(block.variance.mean().sqrt()):.3f}",
            f"{100 * block.between_share:.1f}",
            "" if ends is None else f"{100 * ends[0]:.1f}",
            "" if ends is None else f"{100 * ends[1]:.1f}",
        )
    return table
