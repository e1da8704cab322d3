"""Make tests/checkpoint/data/former.tar.xz: what senet wrote before its files moved into packages.

    git worktree add /tmp/former d1489a3
    PYTHONPATH=/tmp/former/src python scripts/make_former_checkpoints.py OUT.tar.xz

It ran with that commit, the last one of the former state; paths in it are relative to the folder
that it is unpacked into. Most weights are zero, so that xz leaves a few kB of them.
"""

import shutil
import sys
import tarfile
import tempfile
from contextlib import chdir, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from senet.training.checkpoint import open_checkpoint  # type: ignore[import-not-found]
from senet.training.progress import Silent  # type: ignore[import-not-found]
from torch import nn

from senet import create_model, load_adapter
from senet.__main__ import main
from senet.data import Preprocessing
from senet.training.config import RunConfig
from senet.training.loop import train

NET = """\
from torch import nn


def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""
PREPROCESSING = Preprocessing(16, None, (0.5,) * 3, (0.25,) * 3)
DATA = ("--data", "images", "--image-size", "16")
TOLERANCE = "0.0001"  # of the gates' deviations lie on both sides of it
LEFT_OUT = ("figures", "tensorboard", "gates_by_class.csv", "gates.csv", "report.html", ".lock")


class Killed(Exception):  # noqa: N818
    """Ends a run as a kill would, behind its first epoch."""


class KillsInEpoch2(Silent):
    """Hears of the training."""

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Kill it."""
        if epoch == 2:
            raise Killed


def senet(*arguments: str) -> None:
    """Run a command."""
    if main(list(arguments)) != 0:
        raise SystemExit(f"senet {' '.join(arguments)} failed")


def draw_images() -> None:
    """Three classes of 16×16 pixels, 6 images each for training and 3 for validation."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for number, name in enumerate(("ant", "bee", "cow")):
            folder = Path("images", split, name)
            folder.mkdir(parents=True)
            for index in range(count):
                tiles = random.integers(0, 3, (4, 4, 3), dtype=np.uint8) * 60
                tiles[..., number] += 60
                pixels = tiles.repeat(4, axis=0).repeat(4, axis=1)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def publish_plain() -> None:
    """A plain ResNet-8 as `save_pretrained` writes it."""
    torch.manual_seed(0)
    model = create_model("resnet8_cifar", num_classes=3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # 1, -1, 1 … with zeros in between
                index = torch.arange(module.weight.numel()).view_as(module.weight)
                module.weight.copy_((index % 61 == 0) * (1 - index // 61 % 2 * 2))
    model.classes = ("ant", "bee", "cow")
    model.preprocessing = PREPROCESSING.to_dict()
    model.save_pretrained("plain")


def make() -> None:
    """All of it, in this folder."""
    draw_images()
    publish_plain()
    senet("insert", "--weights", "plain", "--out", "inserted", "--reduction", "8")
    tuning = ("--init", "inserted", "--train", "se+head", "--recipe", "quick", "--epochs", "2")
    run = ("--batch-size", "6", "--lr", "0.05", "--device", "cpu", "--out", "run")
    senet("train", *tuning, *run, *DATA)
    # The same run, killed behind its first epoch; the whole one tells what comes out of it.
    Path("whole").mkdir()
    for name in ("metrics.csv", "adapter.safetensors"):
        shutil.copy(Path("run", name), "whole")
    shutil.move("run/config.toml", "whole")
    shutil.rmtree("run")
    with suppress(Killed):
        train(RunConfig.from_toml("whole/config.toml"), progress=KillsInEpoch2())
    judged = (*DATA, "--max-drop", "100", "--device", "cpu")
    senet("fold", "run", "--out", "folded", "--tolerance", TOLERANCE, *judged)
    Path("net.py").write_text(NET)
    foreign = ("--model", "net.py:make", "--num-classes", "3", "--image-size", "16")
    senet("insert", *foreign, "--out", "foreign", "--reduction", "2")
    senet("explain", "foreign", *DATA, "--out", "gates", "--images", "0", "--device", "cpu")
    senet("fold", "foreign", "--out", "foreign-folded", "--tolerance", "1", *judged)
    logits = {}
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        for name in ("plain", "inserted", "run", "folded", "foreign", "foreign-folded"):
            logits[name] = open_checkpoint(name).model(x)
        adapted = open_checkpoint("plain").model
        load_adapter(adapted, "whole/adapter.safetensors")
        logits["adapter"] = adapted(x)
    save_file(logits, "logits.safetensors")


if __name__ == "__main__":
    out = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        make()
        with tarfile.open(out, "w:xz", preset=9) as archive:
            archive.add(".", filter=lambda t: None if Path(t.name).name in LEFT_OUT else t)
    print(f"{out}: {out.stat().st_size:,} bytes")
