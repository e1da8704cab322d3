"""What `senet bench train` compares: a whole training step of (SE-)ResNet-50, and its memory.

The step is forward, cross-entropy, backward and SGD with momentum on float32 channels_last images.
Memory is the peak of a process of its own that does nothing but this step, with the same imports
for all.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from senet.bench.ops import timm_module
from senet.bench.timing import Case, Contestant, Measurement, summarize
from senet.errors import SenetError

BATCH_SIZES = (8, 16)
IMAGE_SIZE = 224
CLASSES = 1000
OURS, OURS_PLAIN = "senet se_resnet50", "senet resnet50"
TIMM, TIMM_COMPILED = "timm seresnet50 eager", "timm seresnet50 compiled"
TORCHVISION = "torchvision resnet50 eager"


def _senet(name: str) -> nn.Module:
    from senet.networks.create import create_model

    return create_model(name, num_classes=CLASSES)


def _torchvision() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=CLASSES)


def _timm() -> Any:
    return timm_module("create_model")("seresnet50", num_classes=CLASSES)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    OURS: partial(_senet, "se_resnet50"),
    OURS_PLAIN: partial(_senet, "resnet50"),
    TIMM: _timm,
    TIMM_COMPILED: _timm,
    TORCHVISION: _torchvision,
}


def training_step(
    model: nn.Module, batch_size: int, *, compiled: bool = False, image_size: int = IMAGE_SIZE
) -> Callable[[], object]:
    """A call that trains `model` for one step on a fixed batch of noise."""
    model = model.train().to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, image_size, image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    network: Callable[..., torch.Tensor] = model
    if compiled:
        torch.compiler.reset()  # else a second batch size compiles for any, which is slower
        network = torch.compile(model, dynamic=False)

    def step() -> object:
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        return optimizer.zero_grad()

    return step


def _contestants(names: Sequence[str], batch_size: int, image_size: int) -> list[Contestant]:
    found = []
    for name in names:
        torch.manual_seed(0)
        compiled = name == TIMM_COMPILED
        step = training_step(NETWORKS[name](), batch_size, compiled=compiled, image_size=image_size)
        found.append(Contestant(name, step))
    return found


def cases(
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    compiled: bool = True,
    image_size: int = IMAGE_SIZE,
) -> list[Case]:
    """The timed cases of `senet bench train`.

    Args:
        batch_sizes: images a step.
        compiled: whether timm's network also runs under torch.compile.
        image_size: side of the images in pixels.
    """
    names = [name for name in NETWORKS if compiled or name != TIMM_COMPILED]
    return [
        Case("training step", f"batch {size}", partial(_contestants, names, size, image_size))
        for size in batch_sizes
    ]


def peak_memory(name: str, batch_size: int, *, tuned: bool, steps: int = 3) -> tuple[float, float]:
    """Peak memory of a training step in a fresh process, in MiB.

    Args:
        name: one of `NETWORKS`.
        batch_size: images a step.
        tuned: whether the process tunes its allocator first.
        steps: how many steps it does.

    Returns:
        The process's peak resident memory, and the part of it that came after all imports.

    Raises:
        SenetError: the process failed, for instance for lack of memory.
    """
    settings = json.dumps([name, batch_size, tuned, steps])
    done = subprocess.run(
        [sys.executable, "-m", "senet.bench.train", settings],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SenetError(f"the memory measurement of {name} failed: {last}")
    whole, after_imports = json.loads(done.stdout)
    return whole, after_imports


def measure_memory(
    batch_size: int, *, tuned: bool, advance: Callable[[str], None]
) -> list[Measurement]:
    """Peak memory of the step of every eager network, whole and without the imports."""
    whole: dict[str, Sequence[float]] = {}
    step: dict[str, Sequence[float]] = {}
    for name in NETWORKS:
        if name == TIMM_COMPILED:  # its peak is the compiler's
            continue
        advance(f"peak memory {name}, batch {batch_size}")
        total, after_imports = peak_memory(name, batch_size, tuned=tuned)
        whole[name], step[name] = (total,), (after_imports,)
    case = f"batch {batch_size}"
    return [
        *summarize("peak memory, process", case, "MiB", whole),
        *summarize("peak memory, step", case, "MiB", step),
    ]


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """What the table amounts to, in a line a claim."""
    lines = []
    for m in measurements:
        where = f"{m.benchmark}, {m.case}: se_resnet50"
        if m.contestant == OURS:
            continue
        if m.unit == "MiB":
            lines.append(f"{where} needs {100 / m.ratio:.1f}% of {m.contestant}")
        elif m.contestant == OURS_PLAIN:
            lines.append(f"{where} takes {100 * (1 / m.ratio - 1):+.1f}% time over {OURS_PLAIN}")
        else:
            lines.append(f"{where} is {m.ratio:.3f} times as fast as {m.contestant}")
    return lines


def _report_memory(settings: str) -> None:
    """Run a training step and print its peak memory: the other end of `peak_memory`."""
    name, batch_size, tuned, steps = json.loads(settings)
    if tuned:
        from senet.support.allocator import tune_allocator

        tune_allocator()
    for build in (_torchvision, _timm, NETWORKS[OURS_PLAIN]):  # the same imports for all
        with torch.device("meta"):
            build()
    F.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))  # starts oneDNN and the threads
    before = psutil.Process().memory_info().rss / 2**20
    step = training_step(NETWORKS[name](), batch_size)
    for _ in range(steps):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps([peak, peak - before]))


if __name__ == "__main__":
    _report_memory(sys.argv[1])
