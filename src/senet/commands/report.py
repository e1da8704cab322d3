"""The page of a finished run."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.data import ImageData, ImageStream, val_loader
from senet.models.cost import count_parameters
from senet.reports.run import ConfidentError, write_run_page
from senet.support.device import choose_device
from senet.support.progress import Progress
from senet.support.text import duration
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.evaluation import Evaluation, go_through
from senet.training.loop import RunResult

ERRORS = 12  # that are shown


def ready(
    checkpoint: Checkpoint, data: ImageData, run: RunConfig
) -> tuple[nn.Module, Iterable[tuple[Tensor, Tensor]]]:
    """The network where its run had it, and a loader of the validation images as it takes them."""
    data = dataclasses.replace(data, preprocessing=checkpoint.preprocessing)
    loader = val_loader(data, batch_size=run.recipe.batch_size, num_workers=run.num_workers)
    model = checkpoint.model.to(choose_device(run.device)).to(memory_format=torch.channels_last)
    return model, loader


def report_run(result: RunResult, data: ImageData, progress: Progress | None = None) -> Path:
    """Write `report.html` of a run on images of classes; returns the file.

    The errors are those of the best checkpoint; of a stream, which cannot be gone back to, none
    are shown.

    Args:
        result: the run.
        data: the data it was trained on.
        progress: hears of the images that are gone through.
    """
    run, evaluation = result.run, result.evaluation
    assert isinstance(evaluation, Evaluation)
    config = RunConfig.from_toml(run / RUN_CONFIG)
    checkpoint = open_checkpoint(run)
    errors = confident_errors(checkpoint, data, config, progress)
    parameters, recipe = count_parameters(checkpoint.model), config.recipe
    facts = [
        ("network", f"{Path(config.model).name}, {parameters:,} parameters"),
        ("data", f"{data.name}, {len(data.train):,} + {evaluation.n:,} images"),
        ("recipe", f"{recipe.name}, {recipe.epochs} epochs, {recipe.optimizer}, lr {recipe.lr:g}"),
        ("best top-1", f"{result.best_top1:.2f}% (epoch {result.best_epoch})"),
        ("last top-1", f"{evaluation.top1:.2f}%"),
        ("last loss", f"{evaluation.loss:.4f}"),
        ("speed", f"{result.images_per_second:.0f} images/s, {duration(result.seconds)} in all"),
    ]
    return write_run_page(
        run, f"Run {run.name}", facts, evaluation.confusion.numpy(), checkpoint.classes, errors
    )


def confident_errors(
    checkpoint: Checkpoint, data: ImageData, config: RunConfig, progress: Progress | None = None
) -> list[ConfidentError]:
    """The validation images that a network takes for another class with the most certainty."""
    if isinstance(data.val, ImageStream):
        return []
    model, loader = ready(checkpoint, data, config)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(logits: Tensor, labels: Tensor) -> None:
        probability, taken = logits.softmax(1).max(1)
        found.append((probability.cpu(), taken.cpu(), labels.cpu()))

    go_through(model, loader, take, config.recipe.mixed_precision, progress)
    probability, taken, labels = (torch.cat(part) for part in zip(*found, strict=True))
    wrong = torch.where(taken != labels)[0]
    surest = wrong[probability[wrong].argsort(descending=True, stable=True)][:ERRORS].tolist()
    return [
        ConfidentError(
            picture=data.val[index][0],
            truth=data.classes[int(labels[index])],
            taken_for=data.classes[int(taken[index])],
            probability=float(probability[index]),
        )
        for index in surest
    ]
