"""What `senet bench train` compares: a whole training step, and its memory.

Of (SE-)ResNet-50, ours and the peers', or of any networks as they are, compiled, and fused.

The step is forward, cross-entropy, backward and SGD with momentum on channels_last images. Memory
on the CPU is the peak of a process of its own that does nothing but this step, with the same
imports for all; on a GPU that of PyTorch's count.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from senet.bench.networks import ENTRANTS, OURS, OURS_PLAIN, Entrant, entrants, entrants_of
from senet.bench.setting import ON_CPU, SETTINGS, Device, Setting, called
from senet.bench.timing import Case, Contestant, Measurement, summarize
from senet.errors import SenetError, UserError

BATCH_SIZES: dict[Device, tuple[int, ...]] = {"cpu": (8, 16), "cuda": (256,)}
IMAGE_SIZE = 224
CLASSES = 1000
# A compiled network's peak is the compiler's.
MEASURED = tuple(entrants("cpu", compiled=False))


def training_step(
    model: nn.Module,
    batch_size: int,
    at: Setting = ON_CPU,
    *,
    compiled: bool = False,
    image_size: int = IMAGE_SIZE,
    classes: int = CLASSES,
) -> Callable[[], object]:
    """A call that trains `model` of so many classes for one step on a fixed batch of noise."""
    model = model.to(at.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = at.noise(batch_size, 3, image_size, image_size, dtype=torch.float32)
    labels = torch.arange(batch_size, device=at.device) % classes
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    network = called(model, compiled=compiled)
    loss = at.autocast(lambda: F.cross_entropy(network(images), labels))

    def step() -> object:
        loss().backward()
        optimizer.step()
        return optimizer.zero_grad()

    return step


def _contestants(
    networks: Mapping[str, Entrant], batch_size: int, at: Setting, image_size: int
) -> list[Contestant]:
    found = []
    for name, network in networks.items():
        torch.manual_seed(0)
        step = training_step(
            network.make(), batch_size, at, compiled=network.compiled, image_size=image_size
        )
        found.append(Contestant(name, step))
    return found


def cases(
    batch_sizes: Sequence[int] | None = None,
    settings: Sequence[Setting] = SETTINGS["cpu"],
    *,
    compiled: bool = True,
    networks: Mapping[str, Entrant] | None = None,
    image_size: int = IMAGE_SIZE,
) -> list[Case]:
    """The timed cases of `senet bench train`.

    Args:
        batch_sizes: images a step (default: `BATCH_SIZES`).
        settings: where and how precisely.
        compiled: whether networks also run under torch.compile.
        networks: contestants (default: `entrants` of the device).
        image_size: side of the images in pixels.

    Raises:
        UserError: a batch of fewer than 2 images, which batch norm cannot be trained on.
    """
    found = []
    for at in settings:
        sizes = batch_sizes or BATCH_SIZES[at.device]
        if min(sizes) < 2:
            raise UserError(f"--batch-sizes must be at least 2, got {tuple(sizes)}")
        chosen = networks or entrants(at.device, compiled=compiled)
        found += [
            Case(
                at.claim("training step"),
                f"batch {size}",
                partial(_contestants, chosen, size, at, image_size),
                at,
            )
            for size in sizes
        ]
    return found


def cases_of(
    models: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    compiled: bool = True,
    image_size: int = IMAGE_SIZE,
) -> list[Case]:
    """The timed cases of networks of timm, torchvision and files, on the CPU.

    Raises:
        UserError: as for `cases` and `entrants_of`.
    """
    found = []
    for model in models:
        networks = entrants_of(model, compiled=compiled)
        for case in cases(batch_sizes, networks=networks, image_size=image_size):
            found.append(replace(case, name=f"{model}, {case.name}"))
    return found


def peak_memory(
    name: str, batch_size: int, *, tuned: bool, steps: int = 3, model: str | None = None
) -> tuple[float, float]:
    """Peak memory of a training step in a fresh process, in MiB.

    Args:
        name: one of `MEASURED`, or of the eager ones of `entrants_of(model)`.
        batch_size: images a step.
        tuned: whether the process tunes its allocator first.
        steps: how many steps it does.
        model: the network that `name` is a form of.

    Returns:
        The process's peak resident memory, and the part of it that came after all imports.

    Raises:
        SenetError: the process failed, for instance for lack of memory.
    """
    settings = json.dumps([name, batch_size, tuned, steps, model])
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
    batch_size: int, *, tuned: bool, advance: Callable[[str], None], model: str | None = None
) -> list[Measurement]:
    """Peak memory of the step of every eager network, whole and without the imports.

    With `model` of its forms, see `entrants_of`.
    """
    whole: dict[str, Sequence[float]] = {}
    step: dict[str, Sequence[float]] = {}
    for name in MEASURED if model is None else entrants_of(model, compiled=False):
        advance(f"peak memory {name}, batch {batch_size}")
        total, after_imports = peak_memory(name, batch_size, tuned=tuned, model=model)
        whole[name], step[name] = (total,), (after_imports,)
    case = f"batch {batch_size}" if model is None else f"{model}, batch {batch_size}"
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


def conclusions_of_models(measurements: Sequence[Measurement]) -> list[str]:
    """What the table of `cases_of` amounts to, in a line a claim."""
    lines = []
    for m in measurements:
        where = f"{m.benchmark}, {m.case}: senet.fuse"
        if m.contestant.endswith(" without SE"):
            lines.append(f"{where}: SE costs {100 * (1 / m.ratio - 1):+.1f}%")
        elif m.contestant.startswith("senet.fuse"):
            continue
        elif m.unit == "MiB":
            lines.append(f"{where} needs {100 / m.ratio:.1f}% of {m.contestant}")
        else:
            lines.append(f"{where} is {m.ratio:.3f} times as fast as {m.contestant}")
    return lines


def _report_memory(settings: str) -> None:
    """Run a training step and print its peak memory: the other end of `peak_memory`."""
    name, batch_size, tuned, steps, model = json.loads(settings)
    if tuned:
        from senet.support.allocator import tune_allocator

        tune_allocator()
    networks = ENTRANTS["cpu"] if model is None else entrants_of(model, compiled=False)
    for each in MEASURED if model is None else ():  # the same imports for all
        with torch.device("meta"):
            networks[each].make()
    F.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))  # starts oneDNN and the threads
    before = psutil.Process().memory_info().rss / 2**20
    step = training_step(networks[name].make(), batch_size)
    for _ in range(steps):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps([peak, peak - before]))


if __name__ == "__main__":
    _report_memory(sys.argv[1])
