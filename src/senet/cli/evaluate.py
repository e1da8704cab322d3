"""`senet evaluate`: the accuracy of a checkpoint."""

import dataclasses
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from senet.cli.options import NO_EVALUATION, EvaluationFlags, Switch, trained_network
from senet.cli.tables import new_table, print_table
from senet.support.collector import importing
from senet.support.files import atomic_write
from senet.support.places import check_file, check_folder
from senet.support.progress import watch
from senet.support.text import printable

if TYPE_CHECKING:
    from senet.commands.evaluate import CheckpointEvaluation
    from senet.tasks.results import AnyResult

SHOWN_CLASSES = 20


def evaluate(
    checkpoint: Path | None = None,
    /,
    *,
    model: str | None = None,
    weights: Path | None = None,
    flags: EvaluationFlags = NO_EVALUATION,
    split: Literal["train", "val", "test"] | None = None,
    json: Switch = False,
    csv: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Measure a checkpoint on validation images: top-1 and top-5 accuracy, or mAP and F1, or R².

    Beneath: recall, precision and F1 of each class, of many classes the worst; of several labels
    an image average precision, recall, precision and F1 of each at the threshold that the
    checkpoint keeps; of numbers R² and errors.

    Images are prepared as the checkpoint says, or as the layout of the weights implies;
    --image-size changes only their size.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, model.safetensors, folder
            of save_pretrained, hf_hub:owner/name; with --model, weights of any released layout, or
            the word pretrained for released ones (senet models --pretrained lists them).
        model: network that the weights are for, where they do not say it (.pth, timm's, …); or the
            checkpoint.
        weights: the same as the checkpoint.
        split: which images: train, val or test (default: val, or test where there is no val).
        json: print JSON instead of a table.
        csv: file for the figures of every class, label or number.
        figures: folder for the confusion matrix of classes as PNG and SVG.
    """
    if csv is not None:
        check_file(csv, "--csv")
    if figures is not None:
        check_folder(figures, "--figures")
    flags.prepare_process()
    with importing():
        from senet.commands.evaluate import draw_confusions, evaluate_path
        from senet.tasks.results import as_csv

    path, name = trained_network(checkpoint, model, weights)
    with watch() as progress:
        result = evaluate_path(
            path,
            model_name=name,
            **flags.arguments(),
            split=split,
            confusions=figures is not None,
            progress=progress,
        )
    if figures is not None:
        draw_confusions(result, figures)
    if csv is not None:
        atomic_write(csv, as_csv(result.result.parts))
    if json:
        print(_as_json(result))
    else:
        print_table(_table(result))
        print_table(_parts_table(result))


def _as_json(evaluation: "CheckpointEvaluation") -> str:
    from senet.tasks.classification import Evaluation

    checkpoint, data, result = evaluation.checkpoint, evaluation.data, evaluation.result
    content: dict[str, Any] = {
        "checkpoint": printable(str(checkpoint.path)),
        "model": checkpoint.model.config["name"],
        "data": printable(data.name),
        "task": checkpoint.task.name,
        "n": result.n,
        **result.figures(),
        "loss": result.loss,
        "images_per_second": result.images_per_second,
        "skipped": [printable(str(each)) for each in data.skipped_val],
        "classes": [printable(name) for name in data.classes],
        f"per_{checkpoint.task.part}": [_plain(each) for each in result.parts],
    }
    if isinstance(result, Evaluation):
        content["confusion"] = result.confusion.tolist()
    return dumps(content, indent=1)


def _plain(each: "AnyResult") -> dict[str, Any]:
    """The figures of one; None for what there is none of, since JSON has no NaN."""
    values = dataclasses.asdict(each)
    return {name: None if value != value else value for name, value in values.items()}


def _parts_table(evaluation: "CheckpointEvaluation") -> Table:
    from senet.data.labels import OUTPUTS
    from senet.tasks.results import worst

    results, headings = evaluation.result.parts, evaluation.result.parts[0].HEADINGS
    shown = results if len(results) <= SHOWN_CLASSES else worst(results, SHOWN_CLASSES)
    name, *figures = headings
    words = [heading for heading in figures if heading.startswith("most")]
    table = new_table(name, right=tuple(each for each in figures if each not in words))
    for heading in words:
        table.add_column(heading)
    for each in shown:
        table.add_row(*each.cells())
    if len(shown) < len(results):
        kind = OUTPUTS[evaluation.checkpoint.task.name]
        table.caption = f"the worst {len(shown)} of {len(results)} {kind}; all by --csv FILE"
    return table


def _table(evaluation: "CheckpointEvaluation") -> Table:
    data, result = evaluation.data, evaluation.result
    headline = result.headline()
    right = ("images", *(heading for heading, _ in headline), "loss", "images/s")
    table = new_table("model", "data", right=right)
    table.add_row(
        evaluation.checkpoint.model.config["name"],
        data.name,
        f"{result.n:,}",
        *(text for _, text in headline),
        f"{result.loss:.4f}",
        f"{result.images_per_second:.0f}",
    )
    if left := len(data.skipped_val):
        what = "shard" if data.name.startswith("shards:") else "image"
        told = f"1 {what} was" if left == 1 else f"{left} {what}s were"
        table.caption = f"{told} left out: unreadable"
    return table
