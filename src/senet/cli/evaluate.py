"""`senet evaluate`: the accuracy of a checkpoint."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from senet.cli.options import NO_EVALUATION, EvaluationFlags, Switch
from senet.cli.tables import new_table, print_table
from senet.support.progress import watch
from senet.support.text import printable

if TYPE_CHECKING:
    from senet.commands.evaluate import CheckpointEvaluation


def evaluate(
    checkpoint: Path,
    /,
    *,
    model: str | None = None,
    flags: EvaluationFlags = NO_EVALUATION,
    split: Literal["train", "val", "test"] | None = None,
    json: Switch = False,
    figures: Path | None = None,
) -> None:
    """Measure top-1 and top-5 accuracy and loss of a checkpoint on validation images.

    Images are prepared as the checkpoint says, or as the layout of the weights implies;
    --image-size changes only their size.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, model.safetensors, folder
            of save_pretrained, hf_hub:owner/name; with --model, weights of any released layout.
        model: network that the weights are for, where they do not say it (.pth, timm's, …).
        split: which images: train, val or test (default: val, or test where there is no val).
        json: print JSON instead of a table.
        figures: folder for the confusion matrix as PNG and SVG.
    """
    flags.prepare_process()
    from senet.commands.evaluate import draw_confusions, evaluate_path

    with watch() as progress:
        result = evaluate_path(
            checkpoint,
            model_name=model,
            **flags.arguments(),
            split=split,
            progress=progress,
        )
    if figures is not None:
        draw_confusions(result, figures)
    if json:
        print(_as_json(result))
    else:
        print_table(_table(result))


def _as_json(evaluation: "CheckpointEvaluation") -> str:
    checkpoint, data, result = evaluation.checkpoint, evaluation.data, evaluation.result
    content = {
        "checkpoint": printable(str(checkpoint.path)),
        "model": checkpoint.model.config["name"],
        "data": printable(data.name),
        "n": result.n,
        "top1": result.top1,
        f"top{result.k}": result.top5,
        "loss": result.loss,
        "images_per_second": result.images_per_second,
        "skipped": [printable(str(each)) for each in data.skipped],
        "classes": [printable(name) for name in data.classes],
        "confusion": result.confusion.tolist(),
    }
    return dumps(content, indent=1)


def _table(evaluation: "CheckpointEvaluation") -> Table:
    data, result = evaluation.data, evaluation.result
    right = ("images", "top-1 (%)", f"top-{result.k} (%)", "loss", "images/s")
    table = new_table("model", "data", right=right)
    table.add_row(
        evaluation.checkpoint.model.config["name"],
        data.name,
        f"{result.n:,}",
        f"{result.top1:.2f}",
        f"{result.top5:.2f}",
        f"{result.loss:.4f}",
        f"{result.images_per_second:.0f}",
    )
    if data.skipped:
        table.caption = f"{len(data.skipped)} images could not be read and were left out"
    return table
