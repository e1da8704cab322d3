"""What a long run tells whoever watches it, and what a user sees of it.

A bar on a terminal, a line an epoch elsewhere.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from senet.support.console import PlainColumn, PlainConsole
from senet.support.text import duration, visible


class Progress:
    """Hears of the progress of `train`, `resume` and `evaluate`, in the main process only.

    The order of calls: per epoch `begin_epoch`, `step` for each step, `begin_evaluation`,
    `evaluated` for each batch, `end_epoch`.
    """

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Epoch `epoch` of `epochs` (from 1) begins; `done` of its `steps` are done already."""

    def step(self, images: int, loss: float, lr: float) -> None:
        """A step over `images` images (of all processes) is done, at learning rate `lr`.

        Told when the next step has begun, or the epoch or the run ends: a GPU does not wait for
        whoever hears it.
        """

    def begin_evaluation(self, batches: int) -> None:
        """An evaluation over that many batches begins."""

    def evaluated(self, images: int) -> None:
        """A batch of `images` images (of this process) is evaluated."""

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """An epoch and its evaluation are over; `row` is its row of metrics.csv."""

    def note(self, message: str) -> None:
        """Something that a user should read, in one line."""


class Silent(Progress):
    """A `Progress` that tells nobody."""


class Several(Progress):
    """Tells each of several what it hears.

    Args:
        listeners: in the order in which they hear.
    """

    def __init__(self, listeners: Iterable[Progress]) -> None:
        self.listeners = tuple(listeners)

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        for each in self.listeners:
            each.begin_epoch(epoch, epochs, steps, done)

    def step(self, images: int, loss: float, lr: float) -> None:
        for each in self.listeners:
            each.step(images, loss, lr)

    def begin_evaluation(self, batches: int) -> None:
        for each in self.listeners:
            each.begin_evaluation(batches)

    def evaluated(self, images: int) -> None:
        for each in self.listeners:
            each.evaluated(images)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        for each in self.listeners:
            each.end_epoch(row)

    def note(self, message: str) -> None:
        for each in self.listeners:
            each.note(message)


class EpochLines(Progress):
    """Prints a line after each epoch, and notes on standard error; what files and pipes get.

    Args:
        console: where the lines go.
        label: put before each line, such as the run's name; nothing by default.
    """

    def __init__(self, console: Console, label: str = "") -> None:
        self.console = console
        self.label = f"{label}: " if label else ""
        self.epoch = self.epochs = self.images = 0
        self.began = self.stepped = time.monotonic()

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        self.epoch, self.epochs, self.images = epoch, epochs, 0
        self.began = self.stepped = time.monotonic()

    def step(self, images: int, loss: float, lr: float) -> None:
        self.images += images
        self.stepped = time.monotonic()

    def end_epoch(self, row: Mapping[str, float]) -> None:
        # Nothing was trained where a run is resumed after the last step of its epoch.
        rate = f"{self.images / max(self.stepped - self.began, 1e-9):.0f} images/s  "
        line = (
            f"{self.label}epoch {self.epoch}/{self.epochs}  loss {row['train_loss']:.3f}  "
            f"val loss {row['val_loss']:.3f}  {measured(row)}"
            f"{rate if self.images else ''}{duration(time.monotonic() - self.began)}"
        )
        self.console.print(Text(visible(line)), soft_wrap=True)

    def note(self, message: str) -> None:
        print(f"senet: {message}", file=sys.stderr)


def measured(row: Mapping[str, float]) -> str:
    """The metrics of a row of metrics.csv, for a line of progress."""
    plain = ("epoch", "step", "lr", "train_loss", "train_top1", "val_loss")
    shares = {"top1": "top-1", "top5": "top-5", "mean_ap": "mAP", "macro_f1": "F1"}  # %
    other = {"r2": "R²", "mae": "MAE"}
    return "".join(
        f"{shares[name]} {value:.2f}%  "
        if name in shares
        else f"{other.get(name, name)} {value:.4g}  "
        for name, value in row.items()
        if name not in plain
    )


class EpochBars(EpochLines):
    """As `EpochLines`, with a bar that shows images/s and the time left of all runs.

    Args:
        console: where the lines go.
        bar: the bars of that console.
        label: put before each line.
        runs_done: runs that are finished.
        runs: all runs that follow each other.
    """

    def __init__(self, console: Console, bar: bars.Progress, label: str, runs_done: int, runs: int):
        super().__init__(console, label)
        self.bar = bar
        self.runs_done = runs_done
        self.runs = runs
        self.task: bars.TaskID = bar.add_task(self.label, total=None, rate="")

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Count steps over all epochs and runs, so that the time left is that of the whole."""
        super().begin_epoch(epoch, epochs, steps, done)
        self.bar.update(
            self.task,
            total=self.runs * epochs * steps,
            completed=(self.runs_done * epochs + epoch - 1) * steps + done,
            description=f"{self.label}epoch {epoch}/{epochs}",
        )

    def step(self, images: int, loss: float, lr: float) -> None:
        super().step(images, loss, lr)
        rate = self.images / max(self.stepped - self.began, 1e-9)
        self.bar.update(self.task, advance=1, rate=f"{rate:.0f} images/s, loss {loss:.3f}")

    def begin_evaluation(self, batches: int) -> None:
        """Say what the bar waits for; count batches where there is no training."""
        if self.epochs:
            self.bar.update(self.task, rate="validation")
        else:
            self.bar.update(self.task, total=batches, description="evaluation")

    def evaluated(self, images: int) -> None:
        if not self.epochs:
            self.images += images
            rate = self.images / max(time.monotonic() - self.began, 1e-9)
            self.bar.update(self.task, advance=1, rate=f"{rate:.0f} images/s")

    def note(self, message: str) -> None:
        self.bar.console.print(Text(visible(f"senet: {message}"), style="yellow"))

    def close(self) -> None:
        self.bar.remove_task(self.task)


@contextmanager
def watch(label: str = "", runs_done: int = 0, runs: int = 1) -> Iterator[EpochLines]:
    """A progress display that fits standard output: bars on a terminal, lines elsewhere.

    Args:
        label: put before each line, such as the run's name.
        runs_done: runs that are finished.
        runs: all runs that follow each other.
    """
    console = PlainConsole()
    if not console.is_terminal:
        yield EpochLines(console, label)
        return
    columns = (
        bars.SpinnerColumn(),
        PlainColumn("{task.description}"),
        bars.BarColumn(bar_width=None),
        bars.MofNCompleteColumn(),
        PlainColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        display = EpochBars(console, bar, label, runs_done, runs)
        yield display
        display.close()
