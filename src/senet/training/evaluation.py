"""Judging a network on a validation set."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric

from senet.errors import UserError
from senet.support.progress import Progress, Silent
from senet.tasks.task import Objective
from senet.training.fsdp import is_sharded, release, together

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):  # noqa: N818 - not an error: the answer to a stop request
    """An evaluation was given up because its `stop` said so."""


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Any, Any]],
    task: Objective,
    *,
    mixed_precision: str = "no",
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Any:
    """What a network is worth on the images of a loader.

    In several processes each goes through its own part of the images; the result is that of all
    and the same in each.

    Args:
        model: evaluated where it is, in evaluation mode; its mode is restored.
        loader: batches of images (N,C,H,W) and targets.
        task: what the outputs and targets are, and what is measured.
        mixed_precision: "no", "bf16" or "fp16" (autocast).
        progress: hears of each batch.
        stop: asked after each batch; True ends the evaluation. In one process only: the others
            would wait for this one.

    Returns:
        The `Judgement` of the task's meter: an `Evaluation` of classes, a `LabelEvaluation`, a
        `NumberEvaluation`, ….

    Raises:
        UserError: the network has another number of outputs, or there are no images.
        Stopped: `stop` answered True.
    """
    meter = task.meter(next(model.parameters()).device)
    seconds = go_through(model, loader, meter.update, mixed_precision, progress, stop)
    return meter.finished(seconds)


def go_through(
    model: nn.Module,
    loader: Iterable[tuple[Any, Any]],
    take: Callable[[Any, Any], None],
    mixed_precision: str = "no",
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """Give a network's outputs (floating tensors in float32) for each batch, with its targets.

    Args:
        model, loader, mixed_precision, progress, stop: as for `evaluate`.
        take: called with outputs and targets, without gradients.

    Returns:
        Seconds, of the process that took longest.

    Raises:
        UserError: there are no images.
        Stopped: `stop` answered True.
    """
    device, dtype = next(model.parameters()).device, AUTOCAST.get(mixed_precision)
    progress, training = progress or Silent(), model.training
    # What FSDP gathers under inference mode could not be trained with afterwards.
    without_gradients = torch.no_grad if is_sharded(model) else torch.inference_mode
    model.eval()
    progress.begin_evaluation(len(loader) if isinstance(loader, Sized) else 0)
    began, images_seen = time.perf_counter(), 0
    try:
        with without_gradients():
            for images, targets, real in together(loader, model):
                images = moved(images, device)
                targets = moved(targets, device, plain=True)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    outputs = model(images)
                if not real:
                    continue
                take(in_float32(outputs), targets)
                images_seen += len(first_tensor(targets))
                progress.evaluated(len(first_tensor(targets)))
                if stop():
                    raise Stopped
    finally:
        model.train(training)
        release(model)
    if not images_seen:
        raise UserError("no validation images: give data with at least one, or fewer processes")
    slowest = MaxMetric().to(device)
    slowest.update(time.perf_counter() - began)
    return float(slowest.compute())


def moved(batch: Any, device: torch.device, *, plain: bool = False) -> Any:
    """A batch on a device: tensors, and those in lists, tuples and mappings.

    Args:
        batch: what the loader gave.
        device: where the network is.
        plain: keep the strides of images as they are.
    """

    def one(x: Tensor) -> Tensor:
        if x.ndim == 4 and not plain:
            return x.to(device, memory_format=torch.channels_last, non_blocking=True)
        return x.to(device, non_blocking=True)

    return _each_tensor(one, batch)


def first_tensor(batch: Any) -> Tensor:
    """A tensor of a batch, whose first dimension counts the images."""
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next(first_tensor(part) for part in parts)


def in_float32(outputs: Any) -> Any:
    """Outputs with their floating tensors in float32."""
    return _each_tensor(lambda x: x.float() if x.is_floating_point() else x, outputs)


def _each_tensor(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch with a function of each tensor in its place; mappings become dicts."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _each_tensor(function, value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return like(batch, [_each_tensor(function, value) for value in batch])
    return batch


def like(batch: Sequence[Any], parts: Sequence[Any]) -> Any:
    """Parts in a container of the batch's kind: a list, a tuple or a named tuple."""
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # type: ignore[call-arg]
