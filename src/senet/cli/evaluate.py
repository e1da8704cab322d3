"""`senet evaluate`: the accuracy of a checkpoint."""

import dataclasses
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from senet.cli.options import NO_EVALUATION, EvaluationFlags, Switch
from senet.cli.tables import new_table, print_table
from senet.support.files import atomic_write
from senet.support.progress import watch
from senet.support.text import printable

if TYPE_CHECKING:
    from senet.commands.evaluate import CheckpointEvaluation
    from senet.reports.classes import ClassResult

SHOWN_CLASSES = 20


def evaluate(
    checkpoint: Path,
    /,
    *,
    model: str | None = None,
    flags: EvaluationFlags = NO_EVALUATION,
    split: Literal["train", "val", "test"] | None = None,
    json: Switch = False,
    csv: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Measure top-1 and top-5 accuracy and loss of a checkpoint on validation images.

    Beneath: recall, precision and F1 of each class, of many classes the worst.

    Images are prepared as the checkpoint says, or as the layout of the weights implies;
    --image-size changes only their size.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, model.safetensors, folder
            of save_pretrained, hf_hub:owner/name; with --model, weights of any released layout, or
            the word pretrained for released ones (senet models --pretrained lists them).
        model: network that the weights are for, where they do not say it (.pth, timm's, …).
        split: which images: train, val or test (default: val, or test where there is no val).
        json: print JSON instead of a table.
        csv: file for the figures of every class.
        figures: folder for the confusion matrix as PNG and SVG.
    """
    flags.prepare_process()
    from senet.commands.evaluate import draw_confusions, evaluate_path
    from senet.reports.classes import as_csv

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
    if csv is not None:
        atomic_write(csv, as_csv(result.classes()))
    if json:
        print(_as_json(result))
    else:
        print_table(_table(result))
        print_table(_class_table(result.classes()))


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
        "per_class": [_plain(each) for each in evaluation.classes()],
        "confusion": result.confusion.tolist(),
    }
    return dumps(content, indent=1)


def _plain(each: "ClassResult") -> dict[str, Any]:
    """The figures of a class; None for what there is none of, since JSON has no NaN."""
    values = dataclasses.asdict(each)
    return {name: None if value != value else value for name, value in values.items()}


def _class_table(results: "list[ClassResult]") -> Table:
    from senet.reports.classes import worst

    shown = results if len(results) <= SHOWN_CLASSES else worst(results, SHOWN_CLASSES)
    table = new_table("class", right=("images", "recall (%)", "precision (%)", "F1 (%)"))
    table.add_column("most often taken for")
    for each in shown:
        table.add_row(
            each.name,
            f"{each.images:,}",
            *("" if value != value else f"{value:.1f}" for value in (each.recall, each.precision)),
            "" if each.f1 != each.f1 else f"{each.f1:.1f}",
            f"{each.taken_for} ({each.mistakes})" if each.mistakes else "",
        )
    if len(shown) < len(results):
        table.caption = f"the worst {len(shown)} of {len(results)} classes; all by --csv FILE"
    return table


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
