"""The long forms of the tests of faults: `make soak`. Prints one JSON line for each.

`python scripts/soak.py [kill|fuzz|leak|all]`; numbers are recorded in docs/reliability.md.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from senet.support.progress import Silent
from senet.training.config import Parallel, RunConfig
from senet.training.loop import train
from senet.training.recipe import Recipe

TESTS = Path(__file__).parents[1] / "tests"
KILLS = 10
SEEDS: dict[int, Parallel] = {11: "ddp", 12: "ddp", 13: "fsdp"}
EPOCHS = 120
FUZZ_EXAMPLES = "1000"


def tiny_run(folder: Path, epochs: int) -> RunConfig:
    """Sixty images of 8×8 pixels and a run over them."""
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for number, name in enumerate(("ant", "bee", "cow")):
            (folder / "data" / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = random.integers(0, 120, (8, 8, 3), dtype=np.uint8)
                pixels[..., number] += 60
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{index}.png")
    recipe = Recipe(
        epochs=epochs, batch_size=8, lr=0.02, schedule="cosine", ema_decay=0.9, grad_clip=5.0
    )
    return RunConfig(
        model="se_resnet8_cifar",
        model_options={"reduction": 4},
        data=str(folder / "data"),
        recipe=recipe,
        out=folder / "run",
        checkpoint_steps=4,
        device="cpu",
    )


def kill(folder: Path) -> dict[str, object]:
    """SIGKILL to a random one of two processes, again and again."""
    reports = []
    for seed, parallel in SEEDS.items():
        place = folder / str(seed)
        place.mkdir()
        replace(tiny_run(place, 2), parallel=parallel).to_toml(place / "config.toml")
        program = TESTS / "training" / "ranks_driver.py"
        arguments = ["kill", str(place / "config.toml"), str(place), str(KILLS), str(seed)]
        done = subprocess.run(
            [sys.executable, str(program), *arguments], capture_output=True, text=True, check=True
        )
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        "runs": sum(report["runs"] for report in reports),
        "killed": sum(sum(report["killed"].values()) for report in reports),
        "lost or different": sum(len(report["wrong"]) for report in reports),
    }


def fuzz(folder: Path) -> dict[str, object]:
    """The fuzzing tests with many examples, drawn anew each time."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS / "test_untrusted.py"), "-k", "damaged or any"],
        env=os.environ | {"SENET_FUZZ_EXAMPLES": FUZZ_EXAMPLES},
        check=False,
        capture_output=True,
        text=True,
    )
    return {
        "examples a test": int(FUZZ_EXAMPLES),
        "exit code": done.returncode,
        "said": done.stdout.strip().splitlines()[-1],
    }


class Watch(Silent):
    """Looks at the process after each epoch."""

    def __init__(self, run: Path) -> None:
        self.process, self.run = psutil.Process(), run
        self.rows: list[dict[str, float]] = []

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Note what the process and the folder hold."""
        files = [path for path in self.run.rglob("*") if path.is_file()]
        self.rows.append(
            {
                "resident MB": self.process.memory_info().rss / 1e6,
                "open files": self.process.num_fds(),
                "threads": self.process.num_threads(),
                "files in the run folder": len(files),
                "checkpoints MB": sum(
                    path.stat().st_size for path in files if "checkpoints" in path.parts
                )
                / 1e6,
            }
        )


def leak(folder: Path) -> dict[str, object]:
    """Many short epochs: what grows?"""
    config = tiny_run(folder, EPOCHS)
    watch = Watch(config.out)
    train(config, progress=watch)
    tenth = EPOCHS // 10
    return {
        "epochs": EPOCHS,
        f"after epoch {tenth}": watch.rows[tenth - 1],
        "after the last": watch.rows[-1],
    }


SOAKS: dict[str, Callable[[Path], dict[str, object]]] = {"kill": kill, "fuzz": fuzz, "leak": leak}


def main(names: list[str]) -> None:
    """Run the named ones, or all."""
    for name in SOAKS if names in ([], ["all"]) else names:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = SOAKS[name](Path(folder))
        where = {"seconds": round(time.perf_counter() - began), "torch": torch.__version__}
        print(json.dumps({"soak": name, **result, **where, "machine": platform.machine()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
