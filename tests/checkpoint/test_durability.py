"""What a power cut or a kill leaves: recorded calls of fsync and rename, and copies of the disk."""

import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from senet.checkpoint.files import defect
from senet.commands.insert import insert_checkpoint
from senet.data import Augmentation
from senet.support.progress import Silent
from senet.training.config import RunConfig
from senet.training.loop import Interrupted, resume, train

Make = Callable[..., RunConfig]


class Disk:
    """Knows which files and folders are on the disk as they are now, and which names.

    POSIX: a file's content is durable once it is synced, its name once its folder is.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.synced: dict[tuple[int, int], tuple[int, int]] = {}
        self.names: list[Path] = []  # that renames gave, and no sync of the folder followed
        self.seen: list[str] = []
        self.wrong: list[str] = []
        self.after: Callable[[Path, Path], object] = lambda source, target: None
        fsync = os.fsync

        def sync(descriptor: int) -> None:
            fsync(descriptor)
            found = os.fstat(descriptor)
            self.synced[found.st_dev, found.st_ino] = (found.st_size, found.st_mtime_ns)
            self.names = [
                name for name in self.names if not os.path.samestat(name.parent.stat(), found)
            ]

        patch.setattr(os, "fsync", sync)
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._renaming(getattr(os, name)))

    def _renaming(self, real: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def rename(source: Any, target: Any) -> None:
            source, target = Path(source), Path(target)
            if self.root in target.parents:
                self.wrong += [f"{path} → {target}" for path in self.lost(source)]
                self.names.append(target)
                self.seen.append(target.name)
            real(source, target)
            if self.root in target.parents:
                self.after(source, target)

        return rename

    def lost(self, path: Path) -> list[Path]:
        """What of a file or folder a power cut would take: what was not synced as it is."""
        inside = sorted(path.iterdir()) if path.is_dir() else []
        found = path.stat()
        # The time of an unsynced folder tells of its entries; an empty one has nothing to lose.
        durable = self.synced.get((found.st_dev, found.st_ino)) == (
            found.st_size,
            found.st_mtime_ns,
        )
        mine = not durable and (bool(inside) or stat.S_ISREG(found.st_mode))
        return [*([path] if mine else []), *(each for entry in inside for each in self.lost(entry))]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    return Disk(monkeypatch, tmp_path)


def test_a_run_renames_nothing_that_is_not_on_the_disk(tiny_config: Make, disk: Disk) -> None:
    """Whatever gets its name by a rename was synced before, and the name is synced behind."""
    run = train(tiny_config()).run
    assert {"run", "last", "previous", "best", "metrics.csv"} <= set(disk.seen)
    assert disk.wrong == []
    assert disk.names == []
    # And checkpoints have no other way to their names: a copy would be other, unsynced files.
    for slot in ("last", "previous", "best"):
        assert disk.lost(run / "checkpoints" / slot) == []


def test_an_inserted_checkpoint_is_on_the_disk(tmp_path: Path, disk: Disk) -> None:
    insert_checkpoint(tmp_path / "new", model="resnet8_cifar", options={})
    assert "new" in disk.seen
    assert disk.wrong == []
    assert disk.names == []
    assert disk.lost(tmp_path / "new") == []


class StopAtOnce(Silent):
    """Ends the run at its first step, before it could write "best" anew."""

    asked = False

    def step(self, images: int, loss: float, lr: float) -> None:
        if not self.asked:  # a second signal would end the process at once
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_kill_between_two_renames_does_not_lose_the_best(
    tiny_config: Make, tmp_path: Path, disk: Disk
) -> None:
    """After each rename of "best", the disk as a kill would leave it: a run goes on with one."""
    kept: list[Path] = []
    contents: list[bytes] = []

    def snapshot(source: Path, target: Path) -> None:
        if "best" in (source.name, target.name) and source.parent.name == "checkpoints":
            kept.append(tmp_path / "killed" / str(len(kept)))
            shutil.copytree(tmp_path / "run", kept[-1])
            if target.name == "best":
                contents.append((target / "model.safetensors").read_bytes())

    disk.after = snapshot
    config = tiny_config(recipe_epochs=4, recipe_ema_decay=None, recipe_augmentation=Augmentation())
    train(config)
    disk.after = lambda source, target: None
    assert len(contents) >= 2, "the test needs an epoch that is better than one before"
    assert any(not (run / "checkpoints" / "best").exists() for run in kept)
    for run in kept:
        with pytest.raises(Interrupted):
            resume(run, progress=StopAtOnce())
        best = run / "checkpoints" / "best"
        assert defect(best) is None
        assert (best / "model.safetensors").read_bytes() in contents
