"""What SE costs in a training step of the small networks of docs/results.md: time and memory.

The networks of a family take turns in one process. Memory is what three steps in a process of their
own need beyond what was resident before (Linux). Batch 128 of 32×32 pixels, SGD, float32.

    python scripts/cifar_cost.py --threads 1
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mobilenet_cifar import plain, se4, se16
from torch import nn

from senet import create_model
from senet.cli.options import prepare_process

BATCH = 128


def _resnet(reduction: int | None) -> nn.Module:
    if reduction is None:
        return create_model("resnet20_cifar", num_classes=10)
    return create_model("se_resnet20_cifar", num_classes=10, reduction=reduction)


FAMILIES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "ResNet-20": {
        "plain": partial(_resnet, None),
        "r=4": partial(_resnet, 4),
        "r=16": partial(_resnet, 16),
    },
    "MobileNet": {"plain": plain, "r=4": se4, "r=16": se16},
}


def stepper(model: nn.Module) -> Callable[[], None]:
    """A call that trains a network for one step on noise."""
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 10

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _resident(what: str) -> float:
    """VmRSS or VmHWM (the peak) of this process on Linux, MiB."""
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) / 1024
    )


def peak_growth(family: str, name: str) -> float:
    """MiB by which three steps of a network exceed what was resident before."""
    step = stepper(FAMILIES[family][name]())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


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
    print("| network | ms a step | ratio to plain (20-80% quantile) | MiB of a step |")
    print("|---|---|---|---|")
    for family, networks in FAMILIES.items():
        steps = {name: stepper(make()) for name, make in networks.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(2 + options.rounds):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if number >= 2:
                    times[name].append(1e3 * (time.perf_counter() - began))
        for name, found in times.items():
            ratios = [a / b for a, b in zip(found, times["plain"], strict=True)]
            low, *_, high = statistics.quantiles(ratios, n=5)
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            memory = subprocess.run(
                [*command, "--memory", family, name], capture_output=True, text=True, check=True
            ).stdout
            print(
                f"| {family} {name} | {statistics.median(found):.1f} "
                f"| {statistics.median(ratios):.3f} ({low:.3f}-{high:.3f}) | {float(memory):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
