"""What a task is to training, evaluation, checkpoints and predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from senet.data.labels import Target, TaskName
from senet.tasks.results import AnyResult

Answer = dict[str, str | float | bool]


@lru_cache(maxsize=32)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(K,) of a task's numbers, made once: each copy to a GPU would wait for all work there."""
    with torch.inference_mode(False):  # an evaluation may come first
        return torch.tensor(values, dtype=dtype, device=device)


class Judgement(Protocol):
    """What an evaluation measured."""

    @property
    def loss(self) -> float:
        """Mean over the images."""
        ...

    @property
    def n(self) -> int:
        """Images, of all processes together."""
        ...

    def row(self) -> dict[str, float]:
        """Its columns in metrics.csv."""
        ...


class NamedJudgement(Judgement, Protocol):
    """Of a network whose outputs have names."""

    @property
    def images_per_second(self) -> float:
        """With reading and preprocessing, of all processes together."""
        ...

    @property
    def parts(self) -> list[AnyResult]:
        """The figures of each class, label or number."""
        ...

    def figures(self) -> dict[str, float]:
        """What it comes to, by name, as JSON tells it."""
        ...

    def headline(self) -> list[tuple[str, str]]:
        """The same with headings, as tables show it."""
        ...


class Meter(Protocol):
    """Measures batch by batch, on the device of the network."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a batch: outputs in float32, and its targets."""
        ...

    def finished(self, seconds: float) -> Judgement:
        """What was measured in that time, over all processes."""
        ...


class Objective(Protocol):
    """What is trained and by what it is judged; all that the loop knows of a task."""

    @property
    def judged(self) -> str:
        """Column of metrics.csv by which one epoch is better than another."""
        ...

    @property
    def heading(self) -> str:
        """What users call it."""
        ...

    @property
    def highest(self) -> bool:
        """Whether the highest value of it is the best, or the lowest."""
        ...

    @property
    def counts_hits(self) -> bool:
        """Whether outputs are logits of classes, whose share of right ones training tells."""
        ...

    @property
    def one_tensor(self) -> bool:
        """Whether outputs must be one tensor."""
        ...

    def score(self, value: float) -> str:
        """A value of `judged` with its unit."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """(N,), or their mean, of the network's outputs in float32 and a batch's targets."""
        ...

    def meter(self, device: torch.device) -> Meter:
        """A fresh one, for an evaluation."""
        ...

    def chosen(self, judgement: Judgement) -> Self:
        """The same with what an evaluation chose, such as thresholds."""
        ...

    def to_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it beside the names; None where they are all."""
        ...


@dataclass(frozen=True)
class Mistake:
    """An image that the network is wrong about.

    Attributes:
        image: its number in the data.
        truth: what it is.
        taken_for: what the network takes it for.
        probability: of that, in [0, 1]; None of numbers.
    """

    image: int
    truth: str
    taken_for: str
    probability: float | None


class Task(Objective, Protocol):
    """A network with named outputs (N,K): classes, labels or numbers.

    `Classification`, `MultiLabel` and `Regression` are all of them.
    """

    @property
    def name(self) -> TaskName: ...

    @property
    def names(self) -> tuple[str, ...]:
        """K names, in the order of the outputs."""
        ...

    @property
    def part(self) -> str:
        """What one of them is called: class, label or number."""
        ...

    @property
    def loss_unit(self) -> str:
        """What the loss is, for an axis."""
        ...

    @property
    def answered(self) -> tuple[str, ...]:
        """The keys of its answers."""
        ...

    def read(self, outputs: Tensor) -> Tensor:
        """(N,K) probabilities or numbers of the network's outputs (N,K)."""
        ...

    def answers(self, values: Tensor, top: int | None) -> list[Answer]:
        """What is told of an image, as plain values.

        Args:
            values: (K,) of `read`.
            top: of classes, how many.
        """
        ...

    def shown(self, answers: Sequence[Answer]) -> list[tuple[str, str]]:
        """Lines of a table of these answers: a name and a value."""
        ...

    def truth(self, target: Target) -> str:
        """An image's target in words."""
        ...

    def mistakes(self, values: Tensor, targets: Tensor, count: int) -> list[Mistake]:
        """The worst ones first.

        Args:
            values: (N,K) of `read`, on the CPU.
            targets: (N,) or (N,K).
            count: the most that are given.
        """
        ...
