"""What is measured of each task, through torchmetrics, over all processes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, Metric, R2Score, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_f1_score,
    binary_precision,
    binary_precision_recall_curve,
    binary_recall,
)
from torchmetrics.utilities import dim_zero_cat

from senet.errors import UserError
from senet.tasks.classification import Evaluation
from senet.tasks.multilabel import THRESHOLD, LabelEvaluation
from senet.tasks.regression import NumberEvaluation
from senet.tasks.results import NAN, LabelResult, NumberResult

if TYPE_CHECKING:
    from senet.tasks.regression import Regression


class Kept(Metric):
    """Rows of numbers, of all batches and processes."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        """Add (N,width)."""
        self.rows.append(rows)

    def compute(self) -> Tensor:
        """(n,width)."""
        return dim_zero_cat(self.rows)


def _kept(width: int, dtype: torch.dtype, device: torch.device) -> Kept:
    """Holds something already: a process without images would have no rows to give."""
    kept = Kept().to(device)
    kept.update(torch.empty(0, width, dtype=dtype, device=device))
    return kept


def _mean(device: torch.device) -> MeanMetric:
    return MeanMetric(nan_strategy="disable").to(device)


class ClassMeter:
    """Cross-entropy, top-1, top-5 and confusions of logits (N,K) and class numbers (N,).

    Args:
        names: K names.
        device: that of the network.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names, self.k = names, min(5, len(names))
        self.loss = _mean(device)
        # Pairs of true and predicted class: a matrix would have K² entries.
        self.judged = _kept(2, torch.int64, device)
        top_k = MulticlassAccuracy(len(names), top_k=self.k, average="micro", validate_args=False)
        self.top_k = top_k.to(device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        _check(outputs, self.names, "classes")
        self.loss.update(F.cross_entropy(outputs, targets, reduction="none"))
        self.judged.update(torch.stack([targets, outputs.argmax(1)], 1))
        self.top_k.update(outputs, targets)

    def finished(self, seconds: float) -> Evaluation:
        outcomes = self.judged.compute().cpu()
        n = len(outcomes)
        pairs, counts = outcomes.unique(dim=0, return_counts=True)
        return Evaluation(
            top1=100 * int((outcomes[:, 0] == outcomes[:, 1]).sum()) / n,
            # The quotient of two counts, exactly.
            top5=100 * round(float(self.top_k.compute()) * n) / n,
            k=self.k,
            loss=float(self.loss.compute()),
            pairs=pairs,
            counts=counts,
            names=self.names,
            n=n,
            images_per_second=n / seconds,
        )


class LabelMeter:
    """Binary cross-entropy, average precision and F1 of logits (N,K) and targets (N,K) 0 or 1.

    Args:
        names: K names.
        thresholds: (K,); None: those of the highest F1 on these images.
        device: that of the network.
    """

    def __init__(
        self, names: tuple[str, ...], thresholds: Sequence[float] | None, device: torch.device
    ) -> None:
        self.names, self.thresholds = names, thresholds
        self.loss = _mean(device)
        self.probabilities = _kept(len(names), torch.float32, device)
        self.targets = _kept(len(names), torch.bool, device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        _check(outputs, self.names, "labels")
        each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        self.loss.update(each.mean(1))
        self.probabilities.update(outputs.sigmoid())
        self.targets.update(targets.bool())

    def finished(self, seconds: float) -> LabelEvaluation:
        """What was measured in that time.

        Raises:
            UserError: no image has any label.
        """
        probabilities = self.probabilities.compute().cpu()
        targets = self.targets.compute().cpu().long()
        check_labels(targets)
        thresholds = self.thresholds or [
            best_threshold(probabilities[:, k], targets[:, k]) for k in range(len(self.names))
        ]
        results = [
            _label_result(name, probabilities[:, k], targets[:, k], thresholds[k])
            for k, name in enumerate(self.names)
        ]
        present = [each for each in results if each.images]
        n = len(targets)
        return LabelEvaluation(
            mean_ap=sum(each.ap for each in present) / len(present),
            macro_f1=sum(each.f1 for each in present) / len(present),
            loss=float(self.loss.compute()),
            labels=tuple(results),
            n=n,
            images_per_second=n / seconds,
        )


def check_labels(targets: Tensor) -> None:
    """See that labels (N,K) of validation images can judge a network.

    Raises:
        UserError: no image has any.
    """
    if not targets.any():
        raise UserError(
            "no validation image has a label, so that there is nothing to judge by: give some that "
            "have"
        )


def check_numbers(images: int) -> None:
    """See that as many validation images can judge a network of numbers.

    Raises:
        UserError: there is a single one.
    """
    if images < 2:
        raise UserError("R² compares images with their mean: give at least 2 for validation")


def best_threshold(probabilities: Tensor, targets: Tensor) -> float:
    """The probability from which on a label is taken as there, for the highest F1.

    It lies in the middle between that of an image and the next lower one, so that rounding of
    another machine does no harm. 0.5 where no image has the label.

    Args:
        probabilities: (N,).
        targets: (N,) 0 or 1.
    """
    if not targets.any():
        return THRESHOLD
    precision, recall, thresholds = binary_precision_recall_curve(probabilities, targets)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    best = int(f1[: len(thresholds)].argmax())
    lower = float(thresholds[best - 1]) if best else 0.0
    return (float(thresholds[best]) + lower) / 2


def _label_result(
    name: str, probabilities: Tensor, targets: Tensor, threshold: float
) -> LabelResult:
    found, images = (probabilities >= threshold).long(), int(targets.sum())
    if not images:
        precision = 0.0 if found.any() else NAN
        return LabelResult(name, 0, NAN, NAN, precision, NAN, threshold)
    share = 100 * float(binary_precision(found, targets)) if found.any() else NAN
    return LabelResult(
        name=name,
        images=images,
        ap=100 * float(binary_average_precision(probabilities, targets)),
        recall=100 * float(binary_recall(found, targets)),
        precision=share,
        f1=100 * float(binary_f1_score(found, targets)),
        threshold=threshold,
    )


class NumberMeter:
    """The loss, R², absolute and squared error of outputs (N,K) and numbers (N,K).

    Args:
        task: knows the numbers' names and units.
        device: that of the network.
    """

    def __init__(self, task: "Regression", device: torch.device) -> None:
        self.task, count = task, len(task.names)
        self.loss = _mean(device)
        self.images = SumMetric().to(device)
        self.r2 = R2Score(multioutput="raw_values").to(device)
        self.mae = MeanAbsoluteError(num_outputs=count).to(device)
        self.mse = MeanSquaredError(num_outputs=count).to(device)
        empty = torch.empty(0, count, device=device)
        self.r2.update(empty, empty)  # learns how many: a process may have no images

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        _check(outputs, self.task.names, "numbers")
        self.loss.update(self.task.loss(outputs, targets))
        self.images.update(len(targets))
        # R² has no unit, and as a difference of sums of squares wants numbers around 0.
        self.r2.update(outputs, self.task.standard(targets))
        for metric in (self.mae, self.mse):
            metric.update(self.task.read(outputs), targets)

    def finished(self, seconds: float) -> NumberEvaluation:
        """What was measured in that time.

        Raises:
            UserError: there is a single image.
        """
        n = int(self.images.compute())
        check_numbers(n)
        columns = (
            _column(metric.compute(), len(self.task.names))
            for metric in (self.r2, self.mae, self.mse)
        )
        numbers = tuple(
            NumberResult(name, r2, mae, mse**0.5)
            for name, r2, mae, mse in zip(self.task.names, *columns, strict=True)
        )
        return NumberEvaluation(
            r2=sum(each.r2 for each in numbers) / len(numbers),
            mae=sum(each.mae for each in numbers) / len(numbers),
            loss=float(self.loss.compute()),
            numbers=numbers,
            n=n,
            images_per_second=n / seconds,
        )


def _column(values: Tensor, count: int) -> list[float]:
    return [float(value) for value in values.reshape(count)]


def _check(outputs: Any, names: Sequence[str], what: str) -> None:
    """Refuse a network with another number of outputs."""
    if outputs.shape[1] != len(names):
        raise UserError(
            f"the network has {outputs.shape[1]} {what}, the data {len(names)}; "
            "evaluate it on the data it was trained on"
        )
