"""Judging a network on a validation set."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.utilities import dim_zero_cat

from senet.errors import UserError
from senet.support.progress import Progress, Silent
from senet.training.fsdp import is_sharded, release, together

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Judgement(Protocol):
    """What an evaluation measured."""

    @property
    def loss(self) -> float:
        """Mean over the images."""
        ...

    def row(self) -> dict[str, float]:
        """Its columns in metrics.csv."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What a network is worth on a validation set.

    Attributes:
        top1: images whose class has the highest logit, %.
        top5: images whose class is among the `k` highest logits, %.
        k: 5, or the number of classes where there are fewer (`top5` is 100 then).
        loss: mean cross-entropy, nats, without label smoothing.
        pairs: (M,2) int64, the pairs of true and predicted class that occurred.
        counts: (M,) int64, how often each did.
        classes: K, their number.
        n: images, of all processes together.
        images_per_second: with reading and preprocessing, of all processes together.
    """

    top1: float
    top5: float
    k: int
    loss: float
    pairs: Tensor
    counts: Tensor
    classes: int
    n: int
    images_per_second: float

    def row(self) -> dict[str, float]:
        """Its columns in metrics.csv."""
        return {"val_loss": self.loss, "top1": self.top1, "top5": self.top5}

    @property
    def confusion(self) -> Tensor:
        """(K,K) int64 counts by true class (row) and predicted class (column), made when asked."""
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        matrix[self.pairs[:, 0], self.pairs[:, 1]] = self.counts
        return matrix


class _Pairs(Metric):
    """True and predicted class of each image, of all processes: a matrix would have K² entries."""

    pairs: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", default=[], dist_reduce_fx="cat")

    def update(self, labels: Tensor, logits: Tensor) -> None:
        """Add (N,) labels and (N,K) logits."""
        self.pairs.append(torch.stack([labels, logits.argmax(1)], 1))

    def compute(self) -> Tensor:
        """(n,2) int64."""
        return dim_zero_cat(self.pairs)


class Stopped(Exception):  # noqa: N818 - not an error: the answer to a stop request
    """An evaluation was given up because its `stop` said so."""


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    mixed_precision: str = "no",
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss, top-1, top-5 and confusions of a network.

    In several processes each goes through its own part of the images; the result is that of all
    and the same in each.

    Args:
        model: evaluated where it is, in evaluation mode; its mode is restored.
        loader: batches of images (N,C,H,W) and class numbers (N,).
        classes: names in the order of the logits.
        mixed_precision: "no", "bf16" or "fp16" (autocast).
        progress: hears of each batch.
        stop: asked after each batch; True ends the evaluation. In one process only: the others
            would wait for this one.

    Raises:
        UserError: the network has another number of classes, or there are no images.
        Stopped: `stop` answered True.
    """
    classes_count = len(classes)
    k = min(5, classes_count)
    device = next(model.parameters()).device
    loss_metric = MeanMetric(nan_strategy="disable").to(device)
    judged = _Pairs().to(device)
    judged.update(
        torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, 1, device=device)
    )
    top_k = MulticlassAccuracy(classes_count, top_k=k, average="micro", validate_args=False)
    top_k = top_k.to(device)

    def take(logits: Tensor, labels: Tensor) -> None:
        if logits.shape[1] != classes_count:
            raise UserError(
                f"the network has {logits.shape[1]} classes, the data {classes_count}; "
                "evaluate it on the data it was trained on"
            )
        loss_metric.update(F.cross_entropy(logits, labels, reduction="none"))
        judged.update(labels, logits)
        top_k.update(logits, labels)

    seconds = go_through(model, loader, take, mixed_precision, progress, stop)
    outcomes = judged.compute().cpu()
    n = len(outcomes)
    pairs, counts = outcomes.unique(dim=0, return_counts=True)
    return Evaluation(
        top1=100 * int((outcomes[:, 0] == outcomes[:, 1]).sum()) / n,
        top5=100 * round(float(top_k.compute()) * n) / n,  # the quotient of two counts, exactly
        k=k,
        loss=float(loss_metric.compute()),
        pairs=pairs,
        counts=counts,
        classes=classes_count,
        n=n,
        images_per_second=n / seconds,
    )


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
