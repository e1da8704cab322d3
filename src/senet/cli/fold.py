"""`senet fold`: constant gates vanish into the layers around them."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from senet.cli.options import NO_EVALUATION, EvaluationFlags, Switch, given_network
from senet.cli.tables import new_table, print_table
from senet.support.collector import importing
from senet.support.progress import watch

if TYPE_CHECKING:
    from senet.gates.fold import FoldReport


def fold(
    checkpoint: Path | None = None,
    /,
    *,
    model: str | None = None,
    weights: Path | None = None,
    out: Path,
    flags: EvaluationFlags = NO_EVALUATION,
    tolerance: float = 0.01,
    max_drop: float = 0.1,
    whole_blocks: Switch = False,
    statistics: Path | None = None,
) -> None:
    """Fold the gates that hardly depend on the image, and measure accuracy, size and speed.

    Blocks are put back, the most harmful first, until no more than --max-drop is lost.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, or model.safetensors.
        model: instead of a checkpoint: torchvision:NAME, timm:NAME, or FILE.py:FUNCTION.
        weights: the model's own state dict as .safetensors or .pth (default: fresh weights);
            without --model a checkpoint.
        out: checkpoint folder to make; it must not exist.
        tolerance: largest standard deviation over the images of a gate that is folded.
        max_drop: most top-1 accuracy that may be lost, in percentage points.
        whole_blocks: fold only blocks none of whose gates moves; a partly folded block is smaller
            but runs outside the fused operator.
        statistics: statistics.safetensors of `senet explain` (default: recorded anew).
    """
    flags.prepare_process()
    with importing():
        from senet.commands.fold import fold_checkpoint

    path, name = given_network(checkpoint, model, weights)
    with watch() as progress:
        result = fold_checkpoint(
            path,
            out,
            model=name,
            tolerance=tolerance,
            max_drop=max_drop,
            partial=not whole_blocks,
            statistics=statistics,
            **flags.arguments(),
            progress=progress,
        )
    print_table(_blocks(result.report))
    print_table(_before_and_after(result.report))
    print(f"Judged on {result.images:,} images. Checkpoint: {result.folder}")


def _blocks(report: "FoldReport") -> Table:
    table = new_table("block", right=("channels", "folded", "bound on the loss (%)"))
    table.add_column("result")
    for block in report.blocks:
        note = f"{block.kind}, into the layer {block.into}" if block.into else block.kind
        if block.name in report.restored:
            note = "kept: the accuracy fell too far"
        elif block.why:
            note = f"{note} ({block.why})"
        table.add_row(
            block.name,
            f"{block.channels:,}",
            f"{block.folded:,}",
            f"{100 * block.loss_bound:.2f}",
            note,
        )
    return table


def _before_and_after(report: "FoldReport") -> Table:
    table = new_table("", right=("parameters", "multiply-adds", "top-1 (%)", "loss", "images/s"))
    for label, side in (("before", report.before), ("after", report.after)):
        table.add_row(
            label,
            f"{side.parameters:,}",
            f"{side.multiply_adds:,}",
            "" if side.top1 is None else f"{side.top1:.2f}",
            "" if side.loss is None else f"{side.loss:.4f}",
            "" if side.images_per_second is None else f"{side.images_per_second:.0f}",
        )
    return table
