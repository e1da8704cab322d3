"""Kills trainings with SIGKILL at many moments, resumes them, compares with an unharmed one.

Run as a program: `crash_driver.py CONFIG.toml FOLDER STRIDE`. Each training is a forked child of
this process, so that PyTorch is imported once. A child kills itself at the k-th event: a step of
the training, or an operation of Python on a file or folder within the run folder (an audit event).
Prints one JSON line: the moments that were tried and those whose result differed.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from senet.support.progress import Silent
from senet.training.config import RunConfig
from senet.training.loop import resume, train

FILES = ("metrics.csv", "checkpoints/last/model.safetensors", "checkpoints/best/model.safetensors")


class Events(Silent):
    """Counts events and kills the process at one of them."""

    def __init__(self, run: Path, deadly: int) -> None:
        self.run, self.deadly, self.count = str(run), deadly, 0
        self.names: list[str] = []
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(args[1], str):
            return  # os.open announces what open announced already
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and self.run in str(
            args[0]
        ):
            self.happen(f"{event} {Path(str(args[0])).name}")

    def step(self, images: int, loss: float, lr: float) -> None:
        self.happen("step")

    def happen(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `action` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            action()
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(run: Path) -> dict[str, str]:
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in FILES}


def main(config_path: Path, folder: Path, stride: int) -> None:
    base = RunConfig.from_toml(config_path).to_dict()

    def config(name: str, **changes: object) -> RunConfig:
        return RunConfig.from_dict(base, out=folder / name, **changes)

    def unharmed() -> None:
        events = Events(folder / "unharmed", -1)
        train(config("unharmed"), progress=events)
        (folder / "events.json").write_text(json.dumps(events.names))

    began = time.perf_counter()
    assert in_child(unharmed) == 0
    duration = time.perf_counter() - began
    expected = digests(folder / "unharmed")
    events = json.loads((folder / "events.json").read_text())
    wrong: list[str] = []
    tried: list[str] = []

    def attempt(
        moment: str, deadly: int = -1, kill_after: float | None = None, **changes: object
    ) -> None:
        run = config(f"killed-{len(tried)}", **changes)

        def start() -> None:
            train(run, progress=Events(run.out, deadly))

        status = in_child(start, kill_after)
        # A kill by the clock may come too late; resuming a finished run must be harmless too.
        assert status == -signal.SIGKILL or (status == 0 and kill_after), (moment, status)
        tried.append(moment)

        def go_on() -> None:
            resume(run.out)

        if not run.out.exists():  # killed before the run folder took its name: begin again
            go_on = lambda: (train(run), None)[1]  # noqa: E731
        if in_child(go_on) != 0 or digests(run.out) != expected:
            wrong.append(moment)

    for k in range(1, len(events) + 1, stride):
        attempt(f"event {k}: {events[k - 1]}", deadly=k)
    last_step = max(i for i, name in enumerate(events, 1) if name == "step")
    attempt("with two loader workers", deadly=last_step - 1, num_workers=2)
    clock = random.Random(1)
    for _ in range(max(1, 6 // stride)):
        delay = clock.uniform(0.3, 0.9) * duration
        attempt(f"after {delay:.2f} s", kill_after=delay)
    report: Mapping[str, Any] = {"events": len(events), "tried": tried, "wrong": wrong}
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
