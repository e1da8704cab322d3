"""What a training or an evaluation tells whoever watches it."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Hears of the progress of `train`, `resume` and `evaluate`, in the main process only.

    The order of calls: per epoch `begin_epoch`, `step` for each step, `begin_evaluation`,
    `evaluated` for each batch, `end_epoch`.
    """

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Epoch `epoch` of `epochs` (from 1) begins; `done` of its `steps` are done already."""

    def step(self, images: int, loss: float, lr: float) -> None:
        """A step over `images` images (of all processes) is done, at learning rate `lr`."""

    def begin_evaluation(self, batches: int) -> None:
        """An evaluation over that many batches begins."""

    def evaluated(self, images: int) -> None:
        """A batch of `images` images (of this process) is evaluated."""

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """An epoch and its evaluation are over; `row` is its row of metrics.csv."""

    def note(self, message: str) -> None:
        """Something that a user should read, in one line."""


class Silent:
    """A `Progress` that tells nobody."""

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Say nothing."""

    def step(self, images: int, loss: float, lr: float) -> None:
        """Say nothing."""

    def begin_evaluation(self, batches: int) -> None:
        """Say nothing."""

    def evaluated(self, images: int) -> None:
        """Say nothing."""

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Say nothing."""

    def note(self, message: str) -> None:
        """Say nothing."""
