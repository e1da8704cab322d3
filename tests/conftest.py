"""Shared by all tests: the seed, and a data set of 60 tiny images with a run of half a second."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from senet.data import Augmentation
from senet.training.config import RunConfig
from senet.training.recipe import Recipe


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `senet.optimize` keeps must not depend on the machine's load: the last is fastest."""

    def times(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for run in runs.values():
            run()
        return {name: float(len(runs) - number) for number, name in enumerate(runs)}

    monkeypatch.setattr("senet.inference.optimization.medians", times)


@pytest.fixture(autouse=True)
def _said_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once in a process, that the fused operator is passed by, once in each test."""
    monkeypatch.setattr("senet.nn.hooks._said", set())


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as they like, whatever the terminal that runs the tests says."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8×8 images, 16 each for training and 4 for validation."""
    root = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for number, name in enumerate(("ant", "bee", "cow")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 120, (8, 8, 3), dtype=np.uint8)
                pixels[..., number] += 60
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Configuration of a run of 2 epochs with 6 steps each; `recipe_*` changes the recipe."""

    def make(**changes: Any) -> RunConfig:
        recipe: dict[str, Any] = {
            "name": "tiny",
            "epochs": 2,
            "batch_size": 8,
            "lr": 0.05,
            "schedule": "cosine",
            "warmup_epochs": 0.5,
            "nesterov": True,
            "weight_decay": 5e-4,
            "decay_norm_and_bias": False,
            "ema_decay": 0.9,
            "grad_clip": 5.0,
            "augmentation": Augmentation(crop="padded", padding=1, flip=True, mixup=0.2),
        }
        recipe |= {k[7:]: v for k, v in changes.items() if k.startswith("recipe_")}
        rest = {k: v for k, v in changes.items() if not k.startswith("recipe_")}
        values: dict[str, Any] = {
            "model": "se_resnet8_cifar",
            "model_options": {"reduction": 4},
            "data": str(tiny_data),
            "recipe": Recipe(**recipe),
            "out": tmp_path / "run",
            "checkpoint_steps": 4,
            "device": "cpu",
        }
        return RunConfig(**(values | rest))

    return make
