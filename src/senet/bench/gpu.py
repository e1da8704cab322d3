"""What `senet bench --device cuda` compares on a GPU: the tail, training steps and inference.

Timed by the GPU's own events, contestants in turns. Maps are bfloat16 under autocast or float32
with TF32 products, channels_last. Peak memory is PyTorch's count of what was allocated at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.bench import timing
from senet.bench.ops import COPY, PASSES, TailModule, TimmTail, shape_name, timm_module
from senet.bench.timing import Case, Contestant, Measurement, summarize
from senet.errors import UserError
from senet.inference import optimize
from senet.networks.create import create_model

What = Literal["ops", "train", "inference"]
# Larger than the caches of a data-centre GPU in 16 bits, but for the last.
SHAPES = ((64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7))
BATCH_SIZES = {"train": (256,), "inference": (1, 256)}
IMAGE_SIZE = 224
PRECISIONS = ("bf16", "TF32")
OURS = "senet"


@dataclass(frozen=True)
class Networks:
    """The networks of a benchmark, by the contestant's name: how each is made, and if compiled."""

    make: Mapping[str, Callable[[], nn.Module]]
    compiled: frozenset[str]


def check_device(device: str) -> None:
    """Raise UserError unless the device is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no CUDA or ROCm GPU here; use --device cpu, or install a "
            "PyTorch build for your GPU (https://pytorch.org/get-started)"
        )


def _networks(*, compiled: bool) -> Networks:
    timm = timm_module("create_model")
    plain = {
        f"{OURS} se_resnet50": partial(create_model, "se_resnet50"),
        f"{OURS} resnet50": partial(create_model, "resnet50"),
        "timm seresnet50": partial(timm, "seresnet50"),
        "timm resnet50": partial(timm, "resnet50"),
    }
    more = {f"{name} compiled": make for name, make in plain.items()} if compiled else {}
    return Networks(plain | more, frozenset(more))


def _autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


def _map(shape: Sequence[int], device: str, precision: str) -> Tensor:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(*shape, device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _tail(
    name: str, module: nn.Module, shape: Sequence[int], device: str, precision: str, *,
    compiled: bool = False,
) -> Contestant:  # fmt: skip
    module = module.to(device).train()
    call: Callable[..., Tensor] = module
    if compiled:
        torch.compiler.reset()
        call = torch.compile(module, dynamic=False)
    inputs = [_map(shape, device, precision).requires_grad_() for _ in range(2)]
    gradient = _map(shape, device, precision)
    leaves = (*inputs, *module.parameters())

    def run() -> object:
        with _autocast(device, precision):
            y = call(*inputs)
        return torch.autograd.grad(y, leaves, gradient.to(y.dtype))

    return Contestant(name, run)


def _tails(
    shape: tuple[int, int, int, int], device: str, precision: str, *, compiled: bool
) -> list[Contestant]:
    found = [
        _tail(OURS, TailModule(shape[1]), shape, device, precision),
        _tail("timm eager", TimmTail(shape[1]), shape, device, precision),
    ]
    if compiled:
        peer = TimmTail(shape[1])
        found.append(_tail("timm compiled", peer, shape, device, precision, compiled=True))
    source, target = (_map(shape, device, precision) for _ in range(2))
    return [*found, Contestant(COPY, partial(target.copy_, source))]


def _training_step(
    model: nn.Module, x: Tensor, precision: str, *, compiled: bool
) -> Callable[[], object]:
    model = model.to(x.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(x), device=x.device) % 1000
    network: Callable[..., Tensor] = torch.compile(model, dynamic=False) if compiled else model

    def step() -> object:
        with _autocast(x.device.type, precision):
            loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        return optimizer.zero_grad()

    return step


def _forward(
    model: nn.Module, x: Tensor, precision: str, *, ours: bool, compiled: bool
) -> Callable[[], object]:
    model = model.to(x.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    model = optimize(model, x) if ours else model
    if precision == "bf16":
        model = model.bfloat16()
        x = x.bfloat16()
    network: Callable[..., Tensor] = torch.compile(model, dynamic=False) if compiled else model

    def run() -> object:
        with torch.inference_mode():
            return network(x)

    return run


def _whole(
    what: What, batch: int, device: str, precision: str, networks: Networks, image_size: int
) -> list[Contestant]:
    found = []
    torch.compiler.reset()
    torch.manual_seed(0)
    x = torch.randn(batch, 3, image_size, image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    for name, make in networks.make.items():
        compiled = name in networks.compiled
        if what == "train":
            run = _training_step(make(), x, precision, compiled=compiled)
        else:
            ours = name.startswith(OURS)
            run = _forward(make(), x, precision, ours=ours, compiled=compiled)
        found.append(Contestant(name, run))
    return found


def cases(
    what: What,
    device: str,
    batch_sizes: Sequence[int] | None = None,
    *,
    compiled: bool = True,
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    networks: Networks | None = None,
    image_size: int = IMAGE_SIZE,
) -> list[Case]:
    """The cases of a benchmark.

    Args:
        what: "ops", "train" or "inference".
        device: "cuda" ("cpu" to try the benchmark itself).
        batch_sizes: images at a time (default: 256, for inference 1 and 256); not with "ops".
        compiled: whether everybody also runs under torch.compile.
        shapes: of the maps of "ops".
        networks: contestants of the other two (default: SE-ResNet-50 and ResNet-50, ours, timm's).
        image_size: pixels a side.

    Raises:
        UserError: batch sizes that cannot be.
    """
    if what == "ops":
        if batch_sizes is not None:
            raise UserError("--batch-sizes is not an option of 'ops', which has fixed shapes")
        return [
            Case(
                f"tail, {precision}",
                shape_name(shape),
                partial(_tails, shape, device, precision, compiled=compiled),
            )
            for precision in PRECISIONS
            for shape in shapes
        ]
    least = 2 if what == "train" else 1
    sizes = batch_sizes or BATCH_SIZES[what]
    if min(sizes) < least:
        raise UserError(f"--batch-sizes must be at least {least}, got {tuple(sizes)}")
    networks = networks or _networks(compiled=compiled)
    return [
        Case(
            f"{what}, {precision}",
            f"batch {size}",
            partial(_whole, what, size, device, precision, networks, image_size),
        )
        for precision in PRECISIONS
        for size in sizes
    ]


def measure(case: Case, device: str, *, rounds: int, warmup: int) -> list[Measurement]:
    """Times of a case's contestants and, on a GPU, their peak memory beyond what waits there.

    TF32 is on for the case's float32 products, for all contestants.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        contestants = case.build()
        ready = Case(case.benchmark, case.name, lambda: contestants)
        found = timing.measure(ready, rounds=rounds, warmup=warmup, device=device)
        if device == "cuda":
            memory = {c.name: (_peak_memory(c.run),) for c in contestants if c.name != COPY}
            found += summarize(f"{case.benchmark}, peak memory", case.name, "MiB", dict(memory))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _peak_memory(run: Callable[[], object]) -> float:
    """MiB that a call allocates at most, beyond what all contestants keep allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    waiting = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - waiting, 1) / 2**20


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """What the table amounts to, in a line a claim."""
    lines = []
    for m in measurements:
        where = f"{m.benchmark} at {m.case}"
        if m.contestant == COPY and m.unit == "ms":
            share = 100 * m.ratio * PASSES / 2
            elements = statistics.geometric_mean(float(n) for n in m.case.split("×")) ** 4
            size = elements * (2 if "bf16" in m.benchmark else 4)
            rate = 2 * size / (m.quantiles[1] * 1e6)
            lines.append(
                f"{where}: senet runs at {share:.0f}% of the copy's bandwidth ({rate:.0f} GB/s), "
                f"counting {PASSES} passes"
            )
        elif m.ratio != 1 and m.contestant != COPY:
            unit = "as much memory" if m.unit == "MiB" else "as much time"
            lines.append(f"{where}: {m.contestant} takes {m.ratio:.2f} times {unit} as ours")
    return lines
