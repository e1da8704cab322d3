"""Images on disk and an in-process command line, for the tests of the commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from senet.__main__ import main

CLASSES = ("blue", "green", "red")


class Outcome(NamedTuple):
    """What a command printed and returned."""

    code: int
    out: str
    err: str

    def refused(self, command: str, *words: str) -> None:
        """Assert that it was bad input: exit code 2, and one line that has all the words."""
        assert self.code == 2, self
        assert self.out == ""
        assert self.err.startswith(f"senet {command}: "), self.err
        assert self.err.count("\n") == 1, self.err
        for word in words:
            assert word in self.err, self.err


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run a command in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def make_images(
    folder: Path, *, classes: Sequence[str] = CLASSES, each: int = 8, side: int = 16
) -> Path:
    """A folder of one folder a class with noisy pictures of one colour each."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 100, (side, side, 3), dtype=np.uint8)
            pixels[..., index % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def make_data(folder: Path, **options: object) -> Path:
    """A folder with train/ and val/."""
    make_images(folder / "train", each=8, **options)  # type: ignore[arg-type]
    make_images(folder / "val", each=4, **options)  # type: ignore[arg-type]
    return folder


def train_flags(data: Path, out: Path) -> list[object]:
    """Flags of a training that takes a second."""
    return [
        "train", "--model", "se_resnet8_cifar", "--reduction", 4, "--data", data, "--recipe",
        "quick", "--epochs", 2, "--batch-size", 8, "--lr", 0.05, "--seed", 0, "--out", out,
        "--device", "cpu", "--no-tune-allocator",
    ]  # fmt: skip
