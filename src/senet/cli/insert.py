"""`senet insert`: SE blocks for any CNN."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from senet.cli.options import Config, OptionalWhole, WholeNumbers, given_network
from senet.cli.tables import new_table, print_table

if TYPE_CHECKING:
    from senet.insertion.report import InsertionReport

Places = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


def insert(
    model: str | None = None,
    *,
    weights: Path | None = None,
    out: Path,
    where: Places = (),
    reduction: float = 16,
    stages: WholeNumbers = None,
    num_classes: OptionalWhole = None,
    image_size: OptionalWhole = None,
    config: Config = None,
) -> None:
    """Put SE blocks into a network without changing its output, and write it as a checkpoint.

    Go on with `senet train --init OUT --train se --data …`: only the gates learn then.

    Args:
        model: a network of `senet models`, torchvision:NAME, timm:NAME, or FILE.py:FUNCTION; or a
            checkpoint (default: that of the checkpoint --weights).
        weights: checkpoint of senet, the model's own state dict as .safetensors or .pth, or the
            word pretrained for released ones (senet models --pretrained lists them).
        out: checkpoint folder to make; it must not exist.
        where: auto, residual, concat, conv, or names of modules whose output is scaled
            (default: auto).
        reduction: reduction ratio r: the hidden width is C/r rounded down.
        stages: stages that get SE, 2 being the first behind the stem (default: all).
        num_classes: classes of the model (default: 1000, or those of the checkpoint).
        image_size: side of the images in pixels (default: the model's own).
    """
    from senet.commands.insert import insert_checkpoint
    from senet.insertion.insert import RULES

    single = where[0] if len(where) == 1 and where[0] in RULES else None
    place = single or (list(where) if where else "auto")
    path, name = given_network(None, model, weights)
    result = insert_checkpoint(
        out,
        model=name,
        weights=path,
        num_classes=num_classes,
        image_size=image_size,
        options={"where": place, "reduction": reduction, "stages": stages},
    )
    print_table(_table(result.report))
    for name, why in result.report.skipped:
        print(f"left out: {name}: {why}")
    print(result.report.summary())
    print(f"Checkpoint: {result.folder}")


def _table(report: "InsertionReport") -> Table:
    right = ("stage", "channels", "hidden", "parameters", "multiply-adds")
    table = new_table("module", "kind", right=right)
    for place in report.places:
        table.add_row(
            place.module,
            place.kind,
            "" if place.stage is None else str(place.stage),
            f"{place.channels:,}",
            f"{place.hidden:,}",
            f"{place.parameters:,}",
            f"{place.multiply_adds:,}",
        )
    return table
