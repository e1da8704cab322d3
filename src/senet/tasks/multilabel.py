"""Any number of labels an image."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.data.labels import Target, TaskName
from senet.tasks.results import AnyResult, LabelResult
from senet.tasks.task import Answer, Judgement, Meter, Mistake, constant

THRESHOLD = 0.5
"""From which probability on an image has a label, where no evaluation has chosen it."""


@dataclass(frozen=True)
class LabelEvaluation:
    """What a network is worth on a validation set of labels.

    Attributes:
        mean_ap: mean over the labels that occur of the average precision, %.
        macro_f1: likewise of F1 at the thresholds, %.
        loss: mean binary cross-entropy of a label, nats, without smoothing and weights.
        labels: the figures of each label, with its threshold.
        n: images, of all processes together.
        images_per_second: with reading and preprocessing, of all processes together.
    """

    mean_ap: float
    macro_f1: float
    loss: float
    labels: tuple[LabelResult, ...]
    n: int
    images_per_second: float

    def row(self) -> dict[str, float]:
        """Its columns in metrics.csv."""
        return {"val_loss": self.loss, "mean_ap": self.mean_ap, "macro_f1": self.macro_f1}

    def figures(self) -> dict[str, float]:
        return {"mean_ap": self.mean_ap, "macro_f1": self.macro_f1}

    def headline(self) -> list[tuple[str, str]]:
        return [("mAP (%)", f"{self.mean_ap:.2f}"), ("macro F1 (%)", f"{self.macro_f1:.2f}")]

    @property
    def parts(self) -> list[AnyResult]:
        return [*self.labels]


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels an image; binary cross-entropy of each, mAP, F1 at thresholds.

    Attributes:
        names: of the labels, in the order of the logits.
        thresholds: (K,) probabilities from which on an image has a label; None: an evaluation
            chooses those of the highest F1, and 0.5 holds where there was none.
        label_smoothing: share of each target that is moved towards 1/2.
        weights: (K,), what an image with a label counts beside one without; None: as much.
    """

    names: tuple[str, ...]
    thresholds: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    weights: tuple[float, ...] | None = None
    name: TaskName = "multilabel"
    part = "label"
    judged = "mean_ap"
    heading = "mAP"
    highest = True
    counts_hits = False
    one_tensor = True
    loss_unit = "binary cross-entropy (nats, log scale)"
    answered = ("label", "probability", "threshold", "present")

    def score(self, value: float) -> str:
        return f"{value:.2f}%"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(N,), mean over the labels, of logits (N,K) and targets (N,K) in [0, 1]."""
        smooth = self.label_smoothing
        weights = None
        if self.weights is not None:
            weights = constant(self.weights, outputs.dtype, outputs.device)
        return F.binary_cross_entropy_with_logits(
            outputs,
            targets * (1 - smooth) + smooth / 2,
            pos_weight=weights,
            reduction="none",
        ).mean(1)

    def meter(self, device: torch.device) -> Meter:
        from senet.tasks.meters import LabelMeter

        return LabelMeter(self.names, self.thresholds, device)

    def chosen(self, judgement: Judgement) -> "MultiLabel":
        """With the thresholds of an evaluation."""
        assert isinstance(judgement, LabelEvaluation)
        thresholds = tuple(each.threshold for each in judgement.labels)
        return dataclasses.replace(self, thresholds=thresholds)

    def to_dict(self) -> dict[str, Any] | None:
        thresholds = None if self.thresholds is None else list(self.thresholds)
        return {"name": self.name, "thresholds": thresholds}

    def read(self, outputs: Tensor) -> Tensor:
        """(N,K) probability of each label."""
        return outputs.float().sigmoid()

    def answers(self, values: Tensor, top: int | None) -> list[Answer]:
        """All labels, the most probable first."""
        limits, probabilities = self._limits.tolist(), values.tolist()
        return [
            {
                "label": self.names[index],
                "probability": probabilities[index],
                "threshold": limits[index],
                "present": probabilities[index] >= limits[index],
            }
            for index in values.argsort(descending=True, stable=True).tolist()
        ]

    @property
    def _limits(self) -> Tensor:
        """(K,) float32."""
        return torch.tensor(self.thresholds or [THRESHOLD] * len(self.names))

    def shown(self, answers: Sequence[Answer]) -> list[tuple[str, str]]:
        """The labels that an image has."""
        found = [
            (str(each["label"]), f"{100 * each['probability']:.1f}")
            for each in answers
            if each["present"]
        ]
        return found or [("(none)", "")]

    def truth(self, target: Target) -> str:
        assert isinstance(target, Tensor)
        names = [name for name, value in zip(self.names, target.tolist(), strict=True) if value]
        return ", ".join(names) or "(none)"

    def mistakes(self, values: Tensor, targets: Tensor, count: int) -> list[Mistake]:
        """Labels that are missing or too many with the most certainty."""
        found = values >= self._limits
        certainty = torch.where(found, values, 1 - values)
        wrong = (found != targets.bool()).flatten()
        places = torch.where(wrong)[0]
        order = certainty.flatten()[places].argsort(descending=True, stable=True)
        mistakes = []
        for place in places[order][:count].tolist():
            image, label = divmod(place, len(self.names))
            name = self.names[label]
            truth, taken_for = name, f"no {name}"
            if found[image, label]:
                truth, taken_for = taken_for, truth
            mistakes.append(Mistake(image, truth, taken_for, float(certainty[image, label])))
        return mistakes
