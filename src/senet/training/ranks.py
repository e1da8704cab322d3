"""What a run needs because it is one of several processes: its rank, a lock, a log, a watchdog."""

import contextlib
import errno
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from senet.errors import UserError
from senet.support.progress import Progress

LOCK, LOGS = ".lock", "logs"
GRACE = 5.0
"""Seconds that a hung process waits after its dump, so that the launcher, which ends all
processes with the first, lets the others write theirs."""


def rank() -> int:
    """This process's rank as the launcher says it, also before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def leave_processes() -> None:
    """Part from the other processes, for work that the main one does alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process.

    A POSIX record lock on `run/.lock`: the kernel gives it up when the process ends in any way,
    loader workers do not inherit it, and NFS carries it between machines. It does not keep out a
    second run in the same process.

    Raises:
        UserError: another process holds it; process and host are named.
    """
    import fcntl  # not on Windows

    with (run / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"run folder {run} is in use by {file.read().strip() or 'another process'}: "
                    "wait for it, or stop it first"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            # A file system without locks: the run is worth more than its protection.
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class RankLog:
    """A few lines about each epoch of one process, in `logs/rank<r>.log`; appended to on resume.

    Args:
        run: the run folder.
        number: rank of the process.
    """

    def __init__(self, run: Path, number: int) -> None:
        (run / LOGS).mkdir(exist_ok=True)
        self.path = run / LOGS / f"rank{number}.log"

    def write(self, text: str) -> None:
        """Append a line with the time (UTC), host and process."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        # A full disk must not end a run for the sake of its log.
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(f"{now} {socket.gethostname()} {os.getpid()} {' '.join(text.split())}\n")


class Watchdog:
    """Ends the process if nothing calls `beat` for a time, with the stacks of all its threads.

    The stacks go to `logs/rank<r>.stacks`, a line about them to standard error, and the exit code
    is 1. A second watch in C (`faulthandler`) covers code that never lets go of the interpreter.

    Args:
        run: the run folder.
        number: rank of the process.
        seconds: the time; None watches nothing.
    """

    def __init__(self, run: Path, number: int, seconds: float | None) -> None:
        self.run, self.number, self.seconds = run, number, seconds
        self._last = self._armed = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self.seconds is not None:
            threading.Thread(target=self._watch, args=(self.seconds,), daemon=True).start()
            self._arm(self.seconds)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that the process is alive."""
        self._last = time.monotonic()
        if self.seconds is not None and self._last - self._armed > 1:
            self._arm(self.seconds)

    def _arm(self, seconds: float) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(seconds + 4 * GRACE, exit=True, file=sys.__stderr__)  # type: ignore[arg-type]

    def _watch(self, seconds: float) -> None:
        while not self._over.is_set():
            left = self._last + seconds - time.monotonic()
            if left > 0:
                self._over.wait(left)
                continue
            self._end(seconds)

    def _end(self, seconds: float) -> None:
        path = self.run / LOGS / f"rank{self.number}.stacks"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as file:
                file.write(
                    f"rank {self.number}, process {os.getpid()}: no step for {seconds:g} s\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            said = f"stacks in {path}"
        except OSError as error:
            said = f"stacks cannot be written: {error}"
        print(
            f"senet: rank {self.number}: no step for {seconds:g} s (--timeout); {said}; to go on "
            f"from the last checkpoint: senet train --resume {self.run}",
            file=sys.__stderr__,
            flush=True,
        )
        time.sleep(GRACE)
        os._exit(1)


class RankProgress(Progress):
    """Passes on what a process hears of its progress, to its log and its watchdog too.

    Args:
        inner: hears everything.
        log: None for a run of one process.
        beat: called with each call.
    """

    def __init__(self, inner: Progress, log: RankLog | None, beat: Callable[[], None]) -> None:
        self.inner, self.log, self.beat = inner, log, beat

    def _log(self, text: str) -> None:
        self.beat()
        if self.log:
            self.log.write(text)

    def hello(self, number: int, processes: int, device: str) -> None:
        self._log(f"rank {number} of {processes} on {device}")

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        self._log(f"epoch {epoch}/{epochs} begins at step {done} of {steps}")
        self.inner.begin_epoch(epoch, epochs, steps, done)

    def step(self, images: int, loss: float, lr: float) -> None:
        self.beat()
        self.inner.step(images, loss, lr)

    def begin_evaluation(self, batches: int) -> None:
        self._log(f"evaluation of {batches} batches begins")
        self.inner.begin_evaluation(batches)

    def evaluated(self, images: int) -> None:
        self.beat()
        self.inner.evaluated(images)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        self._log(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
        self.inner.end_epoch(row)

    def note(self, message: str) -> None:
        self._log(message)
        self.inner.note(message)
