"""What a network's outputs mean: the loss that is trained, and what an evaluation measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric

from senet.data import ImageData
from senet.data.loaders import class_numbers
from senet.errors import UserError
from senet.support.progress import Progress
from senet.training.evaluation import Evaluation, Judgement, evaluate, first_tensor, go_through
from senet.training.recipe import Recipe


class Task(Protocol):
    """A kind of training."""

    @property
    def judged(self) -> str:
        """Column of metrics.csv by which one epoch is better than another."""
        ...

    @property
    def highest(self) -> bool:
        """Whether the highest value of it is the best, or the lowest."""
        ...

    @property
    def counts_hits(self) -> bool:
        """Whether outputs are logits, of which the share of right ones is told while training."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """(N,), or their mean, of the network's outputs in float32 and a batch's targets."""
        ...

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        *,
        mixed_precision: str,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> Judgement:
        """Measure a network on the validation images."""
        ...


@dataclass(frozen=True)
class Classification:
    """One class an image; cross-entropy, top-1 and top-5.

    Attributes:
        classes: names in the order of the logits.
        label_smoothing: share of the target spread over all classes.
        weights: (K,), what an image of each class counts; None: all the same.
    """

    classes: Sequence[str]
    label_smoothing: float = 0.0
    weights: Tensor | None = None
    judged = "top1"
    highest = True
    counts_hits = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(N,) of logits (N,K) and class numbers (N,), or shares of the classes (N,K)."""
        weights = None if self.weights is None else self.weights.to(outputs.device)
        return F.cross_entropy(
            outputs,
            targets,
            weight=weights,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )

    def evaluate(self, model: nn.Module, loader: Any, **options: Any) -> Evaluation:
        return evaluate(model, loader, self.classes, **options)


def classification(recipe: Recipe, data: ImageData) -> Classification:
    """The task of a recipe on images of classes.

    Raises:
        UserError: balanced weights where nobody knows the classes of the images before they come.
    """
    weights = None
    if recipe.class_weights == "balanced":
        targets = class_numbers(data, "class_weights='balanced'")
        weights = balanced_weights(targets, len(data.classes))
    return Classification(data.classes, recipe.label_smoothing, weights)


def balanced_weights(targets: Tensor, classes: int) -> Tensor:
    """(K,) float32, images over (classes with images times images of the class); 0 without images.

    Their mean over the images is 1.

    Args:
        targets: (N,) class numbers.
        classes: K.
    """
    counts = torch.bincount(targets, minlength=classes).float()
    present = counts > 0
    weights = len(targets) / (present.sum() * counts.clamp(min=1))
    return torch.where(present, weights, 0.0)


@dataclass(frozen=True)
class Measured:
    """What `Measuring` found.

    Attributes:
        loss: mean over the images.
        values: of each metric, by its name.
        n: images, of all processes together.
        images_per_second: with reading and preprocessing.
    """

    loss: float
    values: Mapping[str, float]
    n: int
    images_per_second: float

    def row(self) -> dict[str, float]:
        return {"val_loss": self.loss, **self.values}


@dataclass(frozen=True)
class Measuring:
    """Any loss, and metrics of torchmetrics.

    Attributes:
        function: takes outputs and targets; gives (N,) or their mean.
        metrics: each takes outputs and targets, and gives a number.
        judged: name of the metric that tells the best epoch; by default the loss.
    """

    function: Callable[[Any, Any], Tensor]
    metrics: Mapping[str, Metric]
    judged: str = "val_loss"
    counts_hits = False

    def __post_init__(self) -> None:
        known = {"val_loss", *self.metrics}
        if self.judged not in known:
            raise UserError(
                f"judged must be one of {', '.join(sorted(known))}, got {self.judged!r}"
            )
        if taken := {"epoch", "step", "lr", "train_loss", "val_loss"} & self.metrics.keys():
            raise UserError(
                f"{taken.pop()!r} is a column of metrics.csv: name the metric otherwise"
            )

    @property
    def highest(self) -> bool:
        return self.judged != "val_loss" and bool(self.metrics[self.judged].higher_is_better)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return self.function(outputs, targets)

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        *,
        mixed_precision: str,
        progress: Progress,
        stop: Callable[[], bool] = lambda: False,
    ) -> Measured:
        device = next(model.parameters()).device
        mean = MeanMetric(nan_strategy="disable").to(device)
        metrics = {name: metric.to(device) for name, metric in self.metrics.items()}
        for metric in metrics.values():
            metric.reset()
        total = SumMetric().to(device)

        def take(outputs: Any, targets: Any) -> None:
            images = len(first_tensor(targets))
            mean.update(self.function(outputs, targets).mean(), images)
            total.update(images)
            for metric in metrics.values():
                metric.update(outputs, targets)

        seconds = go_through(model, loader, take, mixed_precision, progress, stop)
        values = {name: float(metric.compute()) for name, metric in metrics.items()}
        n = int(total.compute())
        return Measured(float(mean.compute()), values, n, n / seconds)
