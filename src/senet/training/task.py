"""The task of a run: that of its data as its recipe says, or any loss and metrics."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric

from senet.data import ImageData
from senet.data.labels import TaskName
from senet.data.loaders import class_numbers, known_targets
from senet.errors import UserError
from senet.tasks.classification import Classification
from senet.tasks.kinds import AnyTask
from senet.tasks.meters import check_labels, check_numbers
from senet.tasks.multilabel import MultiLabel
from senet.tasks.regression import Error, Regression
from senet.tasks.task import Judgement
from senet.training.evaluation import first_tensor
from senet.training.recipe import RECIPES, Recipe

# What a recipe may ask for beside its default, by task; and which loss each task has.
_LOSSES: Mapping[TaskName, tuple[str, ...]] = {
    "classification": ("auto", "cross_entropy"),
    "multilabel": ("auto", "bce"),
    "regression": ("auto", "mse", "l1"),
}
_NOT_FOR: Mapping[TaskName, tuple[str, ...]] = {
    "classification": (),
    "multilabel": ("sampler",),
    "regression": ("label_smoothing", "class_weights", "sampler", "cutmix"),
}
_PLAIN: Mapping[str, Any] = {
    "label_smoothing": 0.0,
    "class_weights": "none",
    "sampler": "shuffled",
    "cutmix": 0.0,
}
_LEAST_STD = 1e-6  # of a number, beside its mean, that is more than rounding


def fitting(recipe: Recipe, task: TaskName) -> tuple[Recipe, list[str]]:
    """A recipe without what a task has no use for, and what was left out in words.

    Raises:
        UserError: it was asked for beside the recipe's name.
    """
    if recipe.loss not in _LOSSES[task]:
        raise UserError(
            f"loss {recipe.loss!r} is not for {task}, which takes {', '.join(_LOSSES[task])}"
        )
    notes = []
    for name in _NOT_FOR[task]:
        value = _field(recipe, name)
        if value == _PLAIN[name]:
            continue
        named = RECIPES.get(recipe.name)
        if named is None or _field(named, name) != value:
            raise UserError(f"{name} {value!r} is for classes, not for {task}: leave it out")
        notes.append(f"{name} {value!r} of the recipe {recipe.name} is left out: not for {task}")
        if name == "cutmix":
            plain = dataclasses.replace(recipe.augmentation, cutmix=0.0)
            recipe = dataclasses.replace(recipe, augmentation=plain)
        else:
            recipe = dataclasses.replace(recipe, **{name: _PLAIN[name]})
    return recipe, notes


def _field(recipe: Recipe, name: str) -> Any:
    return getattr(recipe.augmentation if name == "cutmix" else recipe, name)


def task_of(recipe: Recipe, data: ImageData) -> AnyTask:
    """The task of a recipe (see `fitting`) on data of `load_data`.

    Raises:
        UserError: balanced weights, or numbers, where nobody knows the labels of the images before
            they come; a number that is the same for all; as for `check_judged`.
    """
    check_judged(data)
    weights = None
    if recipe.class_weights == "balanced" and data.task == "classification":
        targets = class_numbers(data, "class_weights='balanced'")
        weights = tuple(balanced_weights(targets, len(data.classes)).tolist())
    if data.task == "classification":
        return Classification(data.classes, recipe.label_smoothing, weights)
    targets = known_targets(data, data.task)
    if data.task == "multilabel":
        if recipe.class_weights == "balanced":
            others = (len(targets) - targets.sum(0)) / targets.sum(0)
            weights = tuple(torch.where(others.isfinite(), others, 1.0).tolist())
        return MultiLabel(data.classes, None, recipe.label_smoothing, weights)
    mean, std = targets.double().mean(0), targets.double().std(0, correction=0)
    for name, m, s in zip(data.classes, mean.tolist(), std.tolist(), strict=True):
        if s <= _LEAST_STD * abs(m):
            raise UserError(
                f"{name} is {m:g} for all training images of {data.name}: there is nothing to learn"
            )
    error: Error = "l1" if recipe.loss == "l1" else "mse"
    return Regression(data.classes, tuple(mean.tolist()), tuple(std.tolist()), error)


def check_judged(data: ImageData) -> None:
    """See that the validation images can judge a network, as far as their targets are known.

    Raises:
        UserError: numbers of a single image, or no image with a label.
    """
    targets = getattr(data.val, "targets", None)
    if data.task == "classification" or not isinstance(targets, Tensor):
        return
    if data.task == "multilabel":
        check_labels(targets)
    else:
        check_numbers(len(targets))


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
    one_tensor = False

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
    def heading(self) -> str:
        return self.judged

    @property
    def highest(self) -> bool:
        return self.judged != "val_loss" and bool(self.metrics[self.judged].higher_is_better)

    def score(self, value: float) -> str:
        return f"{value:.4g}"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return self.function(outputs, targets)

    def meter(self, device: torch.device) -> "_MeasuringMeter":
        return _MeasuringMeter(self, device)

    def chosen(self, judgement: Judgement) -> "Measuring":
        return self

    def to_dict(self) -> dict[str, Any] | None:
        return None


class _MeasuringMeter:
    def __init__(self, task: Measuring, device: torch.device) -> None:
        self.function = task.function
        self.mean = MeanMetric(nan_strategy="disable").to(device)
        self.metrics = {name: metric.to(device) for name, metric in task.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        self.total = SumMetric().to(device)

    def update(self, outputs: Any, targets: Any) -> None:
        images = len(first_tensor(targets))
        self.mean.update(self.function(outputs, targets).mean(), images)
        self.total.update(images)
        for metric in self.metrics.values():
            metric.update(outputs, targets)

    def finished(self, seconds: float) -> Measured:
        values = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        n = int(self.total.compute())
        return Measured(float(self.mean.compute()), values, n, n / seconds)
