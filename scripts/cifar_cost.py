"""What SE costs in a training step of the small networks of docs/results.md: time and memory.

The networks of a family take turns in one process. Memory is what three steps in a process of their
own need beyond what was resident before (Linux). Batch 128 of 32×32 pixels, SGD, float32.

    python scripts/cifar_cost.py --threads 1
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from mobilenet_cifar import plain, se4, se16
from torch import nn

from senet import create_model
from senet.bench.timing import Case, Contestant, measure
from senet.bench.train import training_step
from senet.cli.options import prepare_process

CLASSES, IMAGE_SIZE, BATCH = 10, 32, 128
_resnet = partial(create_model, "se_resnet20_cifar", num_classes=CLASSES)
FAMILIES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "ResNet-20": {
        "plain": partial(create_model, "resnet20_cifar", num_classes=CLASSES),
        "r=4": partial(_resnet, reduction=4),
        "r=16": partial(_resnet, reduction=16),
    },
    "MobileNet": {"plain": plain, "r=4": se4, "r=16": se16},
}


def step_of(make: Callable[[], nn.Module]) -> Callable[[], object]:
    """A training step of a network."""
    return training_step(make(), BATCH, image_size=IMAGE_SIZE, classes=CLASSES)


def contestants(family: str) -> list[Contestant]:
    """A training step of each network of a family, the plain one first."""
    return [Contestant(name, step_of(make)) for name, make in FAMILIES[family].items()]


def peak_growth(family: str, name: str) -> float:
    """MiB by which three steps of a network exceed what was resident before."""
    step = step_of(FAMILIES[family][name])
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, begins anew
    before = psutil.Process().memory_info().rss / 2**20
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10 - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", nargs=2, metavar=("FAMILY", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare_process(tune_allocator=True)
    torch.set_num_threads(options.threads)
    if options.memory:
        print(peak_growth(*options.memory))
        return
    print("| network | ms a step (20-80% quantile) | ratio to plain | MiB of a step |")
    print("|---|---|---|---|")
    command = [sys.executable, __file__, "--threads", str(options.threads), "--memory"]
    for family in FAMILIES:
        case = Case("training step", family, partial(contestants, family))
        for found in measure(case, rounds=options.rounds, warmup=2):
            memory = subprocess.run(
                [*command, family, found.contestant], capture_output=True, text=True, check=True
            ).stdout
            low, median, high = found.quantiles
            print(
                f"| {family} {found.contestant} | {median:.1f} ({low:.1f}-{high:.1f}) "
                f"| {found.ratio:.3f} | {float(memory):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
