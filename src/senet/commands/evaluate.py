"""The accuracy of a trained network on a data set, and a figure of what it confuses."""

import dataclasses
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from senet.checkpoint.files import Checkpoint, open_checkpoint, open_weights
from senet.data import ImageData, Split, val_loader
from senet.errors import UserError
from senet.reports.figures import confusion_matrix, save_figure, themed
from senet.support.device import choose_device
from senet.support.progress import Progress
from senet.tasks.classification import Evaluation
from senet.tasks.task import NamedJudgement
from senet.training.data import open_named
from senet.training.evaluation import evaluate
from senet.training.task import check_judged


def check_classes(checkpoint: Checkpoint, data: ImageData) -> None:
    """Refuse data whose classes, labels or numbers are not those of the checkpoint.

    Raises:
        UserError: another task, another number of them, or other names in the same number (where
            the checkpoint knows names).
    """
    if checkpoint.task.name != data.task:
        raise UserError(
            f"the checkpoint is for {checkpoint.task.name}, {data.name} holds {data.task}: give "
            "data with labels of the same kind"
        )
    known, found = ([unicodedata.normalize("NFC", name) for name in names]
                    for names in (checkpoint.classes, data.classes))  # fmt: skip
    if len(known) != len(found):
        raise UserError(
            f"num_classes differs: the checkpoint has {len(known)} classes, {data.name} has "
            f"{len(found)}; evaluate on data with the classes it was trained on"
        )
    if checkpoint.model.classes is None:
        return  # weights from elsewhere: their classes have no names
    for index, (a, b) in enumerate(zip(known, found, strict=True)):
        if a != b:
            raise UserError(
                f"class {index} is {a!r} in the checkpoint, but {b!r} in {data.name}; evaluate on "
                "data with the classes it was trained on"
            )


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    data: ImageData,
    *,
    image_size: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> NamedJudgement:
    """Evaluate a checkpoint on the validation images of `data`, prepared as the checkpoint says.

    Args:
        checkpoint: network, classes and preprocessing.
        data: images; its own preprocessing is not used.
        image_size: side of the input in pixels instead of the checkpoint's.
        batch_size: images at a time.
        workers: processes that read images; 0: this one.
        device: "auto", "cpu", "cuda" or "mps".
        progress: hears of each batch.

    Raises:
        UserError: other classes, a side smaller than the network takes, or as for `check_judged`.
    """
    check_classes(checkpoint, data)
    check_judged(data)
    preprocessing = checkpoint.preprocessing
    if image_size is not None:
        preprocessing = preprocessing.resized(image_size)
    least = checkpoint.model.min_input_size
    if preprocessing.image_size < least:
        raise UserError(
            f"images of {preprocessing.image_size} pixels are too small: the network takes "
            f"{least} and more"
        )
    loader = val_loader(
        dataclasses.replace(data, preprocessing=preprocessing),
        batch_size=batch_size,
        num_workers=workers,
    )
    model = checkpoint.model.to(choose_device(device)).to(memory_format=torch.channels_last)
    return evaluate(model, loader, checkpoint.task, progress=progress)


_OF_THE_TRAINING = (
    "val_fraction", "skip_bad_images", "bad_shards", "decode", "image_column", "label_column",
    "label_separator", "task", "channels", "depth", "data_root",
)  # fmt: skip


def open_data(
    checkpoint: Checkpoint | None,
    data_name: str | None,
    data_options: Mapping[str, Any],
    *,
    split: Split | None = None,
    whole: bool = True,
) -> ImageData:
    """Data by name; by default what the checkpoint was trained on, with its val_fraction.

    Args:
        checkpoint: says what it was trained on, and its classes: those of data without a split of
            their own get its numbers by their names, and may be only some of them; None where a
            network comes by name.
        data_name: data set or folder.
        data_options: data_root and further fields of `RunConfig` that say how data are read.
        split: as for `load_data`.
        whole: as for `load_data`, of data that are named.

    Raises:
        UserError: as for `load_data`, or no data named where the checkpoint does not say them.
    """
    options: dict[str, Any] = {"split": split, **data_options}
    if data_name is None:
        if checkpoint is None:
            raise UserError("a network by name does not say what it was trained on: give --data")
        data_name = checkpoint.config.get("data")
        if data_name is None:
            raise UserError(f"{checkpoint.path} does not say what it was trained on: give --data")
        for name in _OF_THE_TRAINING:
            if name in checkpoint.config:
                options.setdefault(name, checkpoint.config[name])
        if os.path.isabs(data_name) and not os.path.exists(data_name):  # noqa: PTH110, PTH117
            raise UserError(
                f"{checkpoint.path} was trained on {data_name}, which is not there: give --data, "
                "the place where it is now"
            )
    else:
        options["whole"] = whole
    if checkpoint is not None:
        options.setdefault("channels", checkpoint.preprocessing.channels)
        options.setdefault("depth", checkpoint.preprocessing.depth)
    if checkpoint is not None and checkpoint.model.classes is not None:
        names = (unicodedata.normalize("NFC", name) for name in checkpoint.classes)
        options["classes"] = tuple(names)
        if checkpoint.task.name != "classification":
            options.setdefault("task", checkpoint.task.name)
    return open_named(data_name, options)


@dataclass(frozen=True)
class CheckpointEvaluation:
    """An evaluation and what was evaluated.

    Attributes:
        checkpoint: network, classes and preprocessing.
        data: the images.
        result: what was measured: an `Evaluation` of classes, a `LabelEvaluation`, a
            `NumberEvaluation`.
    """

    checkpoint: Checkpoint
    data: ImageData
    result: NamedJudgement


def evaluate_path(
    path: Path,
    data_name: str | None,
    data_options: Mapping[str, Any],
    *,
    model_name: str | None = None,
    split: Split | None = None,
    confusions: bool = False,
    batch_size: int,
    workers: int,
    device: str,
    progress: Progress | None = None,
) -> CheckpointEvaluation:
    """Open a checkpoint and data by name, and evaluate.

    Args:
        path: as for `open_checkpoint`; with `model_name`, as for `open_weights`.
        data_name: data set or folder; by default that of the training, with its val_fraction.
        data_options: data_root and further fields of `RunConfig` that say how data are read.
        model_name: name of the network, for weights that do not say it.
        split: as for `load_data`.
        confusions: whether `draw_confusions` is to follow, so that a checkpoint that it is not for
            is told before the work.
        batch_size: images at a time.
        workers: processes that read images; 0: this one.
        device: "auto", "cpu", "cuda" or "mps".
        progress: hears of each batch.

    Raises:
        UserError: as for `open_checkpoint`, `open_weights`, `load_data` and
            `evaluate_checkpoint`, or no data named where the checkpoint does not say them.
    """
    checkpoint = open_checkpoint(path) if model_name is None else open_weights(model_name, path)
    if confusions:
        _check_confusable(checkpoint)
    data = open_data(checkpoint, data_name, data_options, split=split)
    result = evaluate_checkpoint(
        checkpoint,
        data,
        image_size=data_options.get("image_size"),
        batch_size=batch_size,
        workers=workers,
        device=device,
        progress=progress,
    )
    return CheckpointEvaluation(checkpoint, data, result)


def _check_confusable(checkpoint: Checkpoint) -> None:
    if (task := checkpoint.task.name) != "classification":
        raise UserError(f"a confusion matrix is of classes, not of {task}: leave out --figures")


def draw_confusions(evaluation: CheckpointEvaluation, folder: Path) -> None:
    """Draw `confusion_matrix.png` and `.svg` into a folder.

    Raises:
        UserError: there are no classes that could be confused.
    """
    _check_confusable(evaluation.checkpoint)
    assert isinstance(evaluation.result, Evaluation)
    name = evaluation.checkpoint.model.config["name"]
    confusions = {name: evaluation.result.confusion.numpy()}
    with themed():
        figure = confusion_matrix(confusions, evaluation.data.classes)
        save_figure(figure, folder, "confusion_matrix")
