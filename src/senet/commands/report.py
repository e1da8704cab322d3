"""The page of a finished run."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.data import ImageData, ImageStream, val_loader
from senet.data.images import displayed
from senet.models.cost import count_parameters
from senet.reports.run import ConfidentError, write_run_page
from senet.support.device import choose_device
from senet.support.progress import Progress
from senet.support.text import duration
from senet.tasks.kinds import AnyTask
from senet.tasks.task import NamedJudgement
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.evaluation import go_through
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


def gate_classes(data: ImageData) -> tuple[str, ...]:
    """The classes that gates are told apart by; where an image has not one class, all are one."""
    return data.classes if data.task == "classification" else ("all",)


def gate_batches(loader: Iterable[tuple[Tensor, Tensor]], data: ImageData) -> Iterable[Any]:
    """What `record_gates` takes of a loader: with classes, or images alone where all are one."""
    return loader if data.task == "classification" else (images for images, _ in loader)


def readings(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    task: AnyTask,
    mixed_precision: str = "no",
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """What a task reads from the outputs for all images of a loader, and their targets."""
    found: list[tuple[Tensor, Tensor]] = []

    def take(outputs: Tensor, targets: Tensor) -> None:
        found.append((task.read(outputs).cpu(), targets.cpu()))

    go_through(model, loader, take, mixed_precision, progress)
    values, targets = (torch.cat(part) for part in zip(*found, strict=True))
    return values, targets


def report_run(result: RunResult, data: ImageData, progress: Progress | None = None) -> Path:
    """Write `report.html` of a run on data of `load_data`; returns the file.

    The errors are those of the best checkpoint; of a stream, which cannot be gone back to, none
    are shown.

    Args:
        result: the run.
        data: the data it was trained on.
        progress: hears of the images that are gone through.
    """
    run = result.run
    evaluation: NamedJudgement = result.evaluation  # type: ignore[assignment]  # of named outputs
    config = RunConfig.from_toml(run / RUN_CONFIG)
    checkpoint = open_checkpoint(run)
    errors = confident_errors(checkpoint, data, config, progress)
    parameters, recipe = count_parameters(checkpoint.model), config.recipe
    facts = [
        ("network", f"{Path(config.model).name}, {parameters:,} parameters"),
        ("data", f"{data.name}, {len(data.train):,} + {evaluation.n:,} images"),
        ("recipe", f"{recipe.name}, {recipe.epochs} epochs, {recipe.optimizer}, lr {recipe.lr:g}"),
        ("best epoch", f"{result.best_told()} (epoch {result.best_epoch})"),
        *((f"last {heading}", text) for heading, text in evaluation.headline()),
        ("last loss", f"{evaluation.loss:.4f}"),
        ("speed", f"{result.images_per_second:.0f} images/s, {duration(result.seconds)} in all"),
    ]
    return write_run_page(run, f"Run {run.name}", facts, evaluation.parts, errors)


def confident_errors(
    checkpoint: Checkpoint, data: ImageData, config: RunConfig, progress: Progress | None = None
) -> list[ConfidentError]:
    """The validation images that a network is wrong about with the most certainty, or by most."""
    if isinstance(data.val, ImageStream):
        return []
    model, loader = ready(checkpoint, data, config)
    task = checkpoint.task
    values, targets = readings(model, loader, task, config.recipe.mixed_precision, progress)
    return [
        ConfidentError(
            displayed(data.val[each.image][0]), each.truth, each.taken_for, each.probability
        )
        for each in task.mistakes(values, targets, ERRORS)
    ]
