"""One or more numbers an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from senet.data.labels import Target, TaskName
from senet.tasks.results import AnyResult, NumberResult
from senet.tasks.task import Answer, Judgement, Meter, Mistake, constant

Error = Literal["mse", "l1"]


@dataclass(frozen=True)
class NumberEvaluation:
    """What a network is worth on a validation set of numbers.

    Attributes:
        r2: mean of R² over the numbers.
        mae: mean absolute error, mean over the numbers, in their own units.
        loss: mean of the loss, of numbers over the deviation that they have in training.
        numbers: the figures of each.
        n: images, of all processes together.
        images_per_second: with reading and preprocessing, of all processes together.
    """

    r2: float
    mae: float
    loss: float
    numbers: tuple[NumberResult, ...]
    n: int
    images_per_second: float

    def row(self) -> dict[str, float]:
        """Its columns in metrics.csv."""
        return {"val_loss": self.loss, "r2": self.r2, "mae": self.mae}

    def figures(self) -> dict[str, float]:
        return {"r2": self.r2, "mae": self.mae}

    def headline(self) -> list[tuple[str, str]]:
        return [("R²", f"{self.r2:.4f}"), ("MAE", f"{self.mae:.4g}")]

    @property
    def parts(self) -> list[AnyResult]:
        return [*self.numbers]


@dataclass(frozen=True)
class Regression:
    """One or more numbers an image; squared or absolute error, R², mean absolute error.

    The network gives each number less `mean` over `std`, so that one learning rate suits all units.

    Attributes:
        names: of the numbers, in the order of the outputs.
        mean: (K,), of the training images.
        std: (K,), likewise, above 0.
        error: "mse", or "l1" of what the network gives.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    error: Error = "mse"
    name: TaskName = "regression"
    part = "number"
    judged = "r2"
    heading = "R²"
    highest = True
    counts_hits = False
    one_tensor = True
    answered = ("number", "value")

    @property
    def loss_unit(self) -> str:
        what = "squared" if self.error == "mse" else "absolute"
        return f"{what} error in deviations (log scale)"

    def score(self, value: float) -> str:
        return f"{value:.4f}"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(N,), mean over the numbers, of outputs (N,K) and numbers (N,K)."""
        off = outputs - self.standard(targets)
        return (off.square() if self.error == "mse" else off.abs()).mean(1)

    def standard(self, targets: Tensor) -> Tensor:
        """(N,K) numbers as the network gives them."""
        mean, std = self._scale(targets)
        return (targets - mean) / std

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) mean and deviation, with the dtype and on the device of a tensor."""
        where = (like.dtype, like.device)
        return constant(self.mean, *where), constant(self.std, *where)

    def meter(self, device: torch.device) -> Meter:
        from senet.tasks.meters import NumberMeter

        return NumberMeter(self, device)

    def chosen(self, judgement: Judgement) -> "Regression":
        return self

    def to_dict(self) -> dict[str, Any] | None:
        mean, std = list(self.mean), list(self.std)
        return {"name": self.name, "mean": mean, "std": std, "error": self.error}

    def read(self, outputs: Tensor) -> Tensor:
        """(N,K) numbers in their own units."""
        outputs = outputs.float()
        mean, std = self._scale(outputs)
        return outputs * std + mean

    def answers(self, values: Tensor, top: int | None) -> list[Answer]:
        pairs = zip(self.names, values.tolist(), strict=True)
        return [{"number": name, "value": value} for name, value in pairs]

    def shown(self, answers: Sequence[Answer]) -> list[tuple[str, str]]:
        return [(str(each["number"]), f"{each['value']:.5g}") for each in answers]

    def truth(self, target: Target) -> str:
        assert isinstance(target, Tensor)
        return self._said(target)

    def mistakes(self, values: Tensor, targets: Tensor, count: int) -> list[Mistake]:
        """Those that are furthest off, in deviations."""
        off = ((values - targets) / torch.tensor(self.std)).abs().amax(1)
        return [
            Mistake(index, self._said(targets[index]), self._said(values[index]), None)
            for index in off.argsort(descending=True, stable=True)[:count].tolist()
        ]

    def _said(self, numbers: Tensor) -> str:
        if len(self.names) == 1:
            return f"{float(numbers[0]):.4g}"
        pairs = zip(self.names, numbers.tolist(), strict=True)
        return ", ".join(f"{name} {value:.4g}" for name, value in pairs)
