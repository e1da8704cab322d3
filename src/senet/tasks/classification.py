"""One class an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.data.labels import Target, TaskName
from senet.tasks.results import AnyResult, class_results
from senet.tasks.task import Answer, Judgement, Meter, Mistake, constant


@dataclass(frozen=True)
class Evaluation:
    """What a network is worth on a validation set of classes.

    Attributes:
        top1: images whose class has the highest logit, %.
        top5: images whose class is among the `k` highest logits, %.
        k: 5, or the number of classes where there are fewer (`top5` is 100 then).
        loss: mean cross-entropy, nats, without label smoothing.
        pairs: (M,2) int64, the pairs of true and predicted class that occurred.
        counts: (M,) int64, how often each did.
        names: of the K classes.
        n: images, of all processes together.
        images_per_second: with reading and preprocessing, of all processes together.
    """

    top1: float
    top5: float
    k: int
    loss: float
    pairs: Tensor
    counts: Tensor
    names: tuple[str, ...]
    n: int
    images_per_second: float

    def row(self) -> dict[str, float]:
        """Its columns in metrics.csv."""
        return {"val_loss": self.loss, "top1": self.top1, "top5": self.top5}

    def figures(self) -> dict[str, float]:
        return {"top1": self.top1, f"top{self.k}": self.top5}

    def headline(self) -> list[tuple[str, str]]:
        return [("top-1 (%)", f"{self.top1:.2f}"), (f"top-{self.k} (%)", f"{self.top5:.2f}")]

    @property
    def classes(self) -> int:
        """K."""
        return len(self.names)

    @property
    def confusion(self) -> Tensor:
        """(K,K) int64 counts by true class (row) and predicted class (column), made when asked."""
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        matrix[self.pairs[:, 0], self.pairs[:, 1]] = self.counts
        return matrix

    @property
    def parts(self) -> list[AnyResult]:
        return [*class_results(self.confusion.numpy(), self.names)]


@dataclass(frozen=True)
class Classification:
    """One class an image; cross-entropy, top-1 and top-5.

    Attributes:
        names: of the classes, in the order of the logits.
        label_smoothing: share of the target spread over all classes.
        weights: (K,), what an image of each class counts; None: all the same.
    """

    names: tuple[str, ...]
    label_smoothing: float = 0.0
    weights: tuple[float, ...] | None = None
    name: TaskName = "classification"
    part = "class"
    judged = "top1"
    heading = "top-1"
    highest = True
    counts_hits = True
    one_tensor = True
    loss_unit = "cross-entropy (nats, log scale)"
    answered = ("class", "probability")

    def score(self, value: float) -> str:
        return f"{value:.2f}%"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(N,) of logits (N,K) and class numbers (N,), or shares of the classes (N,K)."""
        weights = None
        if self.weights is not None:
            weights = constant(self.weights, outputs.dtype, outputs.device)
        return F.cross_entropy(
            outputs,
            targets,
            weight=weights,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )

    def meter(self, device: torch.device) -> Meter:
        from senet.tasks.meters import ClassMeter

        return ClassMeter(self.names, device)

    def chosen(self, judgement: Judgement) -> "Classification":
        return self

    def to_dict(self) -> dict[str, Any] | None:
        return None

    def read(self, outputs: Tensor) -> Tensor:
        """(N,K) softmax probabilities."""
        return outputs.float().softmax(-1)

    def answers(self, values: Tensor, top: int | None) -> list[Answer]:
        probabilities, indices = values.topk(min(top or 5, len(self.names)))
        return [
            {"class": self.names[index], "probability": probability}
            for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]

    def shown(self, answers: Sequence[Answer]) -> list[tuple[str, str]]:
        return [(str(each["class"]), f"{100 * each['probability']:.1f}") for each in answers]

    def truth(self, target: Target) -> str:
        return self.names[int(target)]

    def mistakes(self, values: Tensor, targets: Tensor, count: int) -> list[Mistake]:
        """The images taken for another class with the most certainty."""
        probability, taken = values.max(1)
        wrong = torch.where(taken != targets)[0]
        surest = wrong[probability[wrong].argsort(descending=True, stable=True)][:count].tolist()
        return [
            Mistake(
                index,
                self.names[int(targets[index])],
                self.names[int(taken[index])],
                float(probability[index]),
            )
            for index in surest
        ]
