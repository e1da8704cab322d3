"""Whatever stops a run, resuming it ends in the same bits."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from senet.checkpoint import write as checkpoint
from senet.checkpoint.write import defect
from senet.errors import SenetError, UserError
from senet.support.files import durable_write
from senet.support.progress import Silent
from senet.training.config import RunConfig
from senet.training.loop import Interrupted, resume, train
from senet.training.session import Position, Session

Make = Callable[..., RunConfig]
FILES = ("metrics.csv", "checkpoints/last/model.safetensors", "checkpoints/best/model.safetensors")


def contents(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in FILES]


@pytest.fixture
def expected(tiny_config: Make, tmp_path: Path) -> list[bytes]:
    """What an unharmed run leaves."""
    return contents(train(tiny_config(out=tmp_path / "unharmed")).run)


class At(Silent):
    """Does something at the n-th call of one of its methods."""

    def __init__(self, method: str, n: int, action: Callable[[], Any]) -> None:
        self.left = n

        def count(*_: object) -> None:
            self.left -= 1
            if self.left == 0:
                action()

        setattr(self, method, count)


def test_kill_9_at_any_moment(tiny_config: Make, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    tiny_config().to_toml(config)
    driver = Path(__file__).with_name("crash_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(config), str(tmp_path), "7"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == [], done.stderr[-3000:]
    assert len(report["tried"]) >= 10
    assert any("step" in moment for moment in report["tried"])
    assert any("rename" in moment or "open" in moment for moment in report["tried"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("method", "n"), [("step", 3), ("step", 6), ("evaluated", 1)])
def test_signal_stops_with_checkpoint(
    tiny_config: Make, expected: list[bytes], number: signal.Signals, method: str, n: int
) -> None:
    config = tiny_config(checkpoint_steps=0)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"senet train --resume {config.out}"):
        train(config, progress=At(method, n, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) == before
    assert defect(config.out / "checkpoints" / "last") is None
    resume(config.out)
    assert contents(config.out) == expected


def test_ctrl_c_reaches_the_loader_workers_too(tiny_config: Make, expected: list[bytes]) -> None:
    def to_the_group() -> None:
        for worker in multiprocessing.active_children():
            assert worker.pid
            os.kill(worker.pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    config = tiny_config(checkpoint_steps=0, num_workers=2)
    with pytest.raises(Interrupted):
        train(config, progress=At("step", 3, to_the_group))
    resume(config.out)
    assert contents(config.out) == expected


def test_second_ctrl_c_acts_at_once(tiny_config: Make) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it

    def twice() -> None:
        # Not os.kill, whose second signal may come before Python has seen the first.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(), progress=At("step", 2, twice))
    finally:
        signal.signal(signal.SIGINT, before)


def stop_after(config: RunConfig, steps: int) -> None:
    """Run it up to a step; its checkpoints of before stay."""

    class Halt(Exception):  # noqa: N818
        pass

    def halt() -> None:
        raise Halt

    with pytest.raises(Halt):
        train(config, progress=At("step", steps, halt))


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "missing"])
def test_corrupt_last_is_named_and_previous_used(
    tiny_config: Make, expected: list[bytes], name: str, damage: str
) -> None:
    config = tiny_config()
    stop_after(config, 9)  # checkpoints after steps 4 and 6 (end of the epoch) and 8
    last = config.out / "checkpoints" / "last"
    whole = (last / name).read_bytes()
    if damage == "torn":
        (last / name).write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        (last / name).write_bytes(changed)
    else:
        (last / name).unlink()
    with pytest.warns(UserWarning, match=r"checkpoints/last is corrupt \(.*\): it is left out"):
        resume(config.out)
    assert contents(config.out) == expected


def test_no_intact_checkpoint(tiny_config: Make) -> None:
    config = tiny_config()
    stop_after(config, 9)
    for slot in ("last", "previous"):
        (config.out / "checkpoints" / slot / "training_state.pt").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="corrupt"),
        pytest.raises(SenetError, match="no intact checkpoint"),
    ):
        resume(config.out)


@pytest.mark.parametrize("failing_write", [1, 2, 3])
def test_full_disk_keeps_previous(
    tiny_config: Make,
    expected: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    failing_write: int,
) -> None:
    config = tiny_config()
    write, calls = durable_write, 0

    def full(path: Path, content: bytes | memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 + failing_write:  # in the second checkpoint
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(checkpoint, "durable_write", full)
    with pytest.raises(SenetError, match="No space left on device; the checkpoint before it"):
        train(config)
    folder = config.out / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["last"]
    assert defect(folder / "last") is None
    monkeypatch.undo()
    resume(config.out)
    assert contents(config.out) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 2.5 MB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk(tiny_config: Make, expected: list[bytes], small_disk: Path) -> None:
    config = tiny_config(out=small_disk / "run")
    with pytest.raises(SenetError, match="No space left on device"):
        train(config)
    last = config.out / "checkpoints" / "last"
    assert defect(last) is None
    assert not list(last.parent.glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    resume(config.out)
    assert contents(config.out) == expected


def test_resume_of_a_finished_run_repeats_its_result(tiny_config: Make) -> None:
    first = train(tiny_config())
    before = contents(first.run)
    again = resume(first.run)
    assert contents(first.run) == before
    assert again.history == first.history
    assert again.evaluation.top1 == first.evaluation.top1
    assert again.evaluation.confusion.equal(first.evaluation.confusion)


def test_run_folder_can_move(tiny_config: Make, expected: list[bytes], tmp_path: Path) -> None:
    config = tiny_config()
    stop_after(config, 5)
    moved = config.out.rename(tmp_path / "elsewhere")
    resume(moved)
    assert contents(moved) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, "epochs is 2 there and 3 here"),
        ({"lr": 0.1}, r"lr is 0\.05 there and 0\.1 here"),
        ({"model": "resnet8_cifar"}, "model is 'se_resnet8_cifar' there"),
        ({"reduction": 16}, "reduction is 4 there"),
        ({"recipe": "cifar"}, "recipe is 'tiny' there"),
        ({"val_fraction": 0.1}, "val_fraction is not set there"),
        ({"num_workers": 1}, "num_workers is 0 there"),
    ],
)
def test_resume_refuses_changed_option(
    tiny_config: Make, options: dict[str, Any], message: str
) -> None:
    config = tiny_config()
    stop_after(config, 5)
    with pytest.raises(UserError, match=message):
        resume(config.out, options=options)


def test_resume_takes_unchanged_options(tiny_config: Make, expected: list[bytes]) -> None:
    config = tiny_config()
    stop_after(config, 5)
    same = {"epochs": 2, "model": config.model, "recipe": "tiny", "out": config.out}
    resume(config.out, options=same)
    assert contents(config.out) == expected


def test_resume_refuses_edited_config(tiny_config: Make) -> None:
    config = tiny_config()
    stop_after(config, 5)
    path = config.out / "config.toml"
    path.write_text(path.read_text().replace("lr = 0.05", "lr = 0.06"))
    with pytest.raises(UserError, match=r"was changed since the run began \(recipe.lr\)"):
        resume(config.out)


def test_resume_allows_edited_machine_options(tiny_config: Make, expected: list[bytes]) -> None:
    config = tiny_config()
    stop_after(config, 5)
    path = config.out / "config.toml"
    path.write_text(path.read_text().replace("num_workers = 0", "num_workers = 1"))
    resume(config.out)
    assert contents(config.out) == expected


def test_resume_refuses_changed_data(tiny_config: Make, tiny_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    config = tiny_config(data=str(data))
    stop_after(config, 7)
    (data / "train" / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match="is not what it was when the run began"):
        resume(config.out)


def test_another_number_of_threads_is_told(tiny_config: Make) -> None:
    class Notes(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    config = tiny_config()
    stop_after(config, 11)
    threads, seen = torch.get_num_threads(), Notes()
    torch.set_num_threads(threads + 1)
    try:
        resume(config.out, progress=seen)
    finally:
        torch.set_num_threads(threads)
    assert f"the run began with threads {threads}, now {threads + 1}" in seen.notes[-1]


def test_resume_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it has no config\.toml"):
        resume(tmp_path)


def test_events_of_repeated_steps_are_purged(tiny_config: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config()
    stop_after(config, 6)  # the checkpoint is that of step 4
    resume(config.out)
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("epoch/top1")] == [6, 12]


def test_random_generators_are_restored(tiny_config: Make) -> None:
    def draw() -> tuple[float, float, float, float]:
        normal = float(np.random.standard_normal())  # noqa: NPY002
        return random.random(), random.gauss(0, 1), normal, float(torch.rand(()))

    session = Session(tiny_config())
    draw()  # leaves half of a pair of normal numbers behind in each generator
    state = session.state(Position())
    first = draw()
    assert draw() != first
    session.restore_random(state)
    assert draw() == first
