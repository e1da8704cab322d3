"""Folders of tiny images to load."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny_images import picture

from senet.data import images

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without the remark on transparency, made once a process."""
    monkeypatch.setattr(images, "_clear", [])
    monkeypatch.setattr(images, "_told", [])


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Make a folder of classes: `make_folder({"train": {"cat": 3}, "val": {"cat": 1}})`."""

    def make(
        splits: Mapping[str, Mapping[str, int]],
        *,
        size: Callable[[int], tuple[int, int]] = lambda _: (8, 8),
        mode: str = "RGB",
        suffix: str = ".png",
    ) -> Path:
        root = tmp_path / "images"
        seed = 0
        for split, classes in splits.items():
            for name, count in classes.items():
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    seed += 1
                    picture(seed, size(seed), mode).save(folder / f"{i:03}{suffix}")
        return root

    return make
