"""What `senet bench ops` compares: the operators against the modules of timm and torchvision.

Everything is channels_last, forward and backward, in training mode, with gradients of all inputs
and parameters. A copy of the same map is the yardstick: it reads and writes the map once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from senet.bench.setting import SETTINGS, Device, Setting, called
from senet.bench.timing import Case, Contestant, Measurement, compared, geometric_mean
from senet.nn.block import SqueezeExcitation
from senet.nn.tails import bn_relu, residual_tail
from senet.support.extras import optional

Shape = tuple[int, int, int, int]

# The last convolution's output in each stage of (SE-)ResNet-50. Of batch 64, all but the last map
# are larger than the caches of a data-centre GPU in 16 bits.
_MAPS = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
SHAPES: dict[Device, tuple[Shape, ...]] = {
    "cpu": tuple((16, *shape) for shape in _MAPS),
    "cuda": tuple((64, *shape) for shape in _MAPS),
}
# Each axis over a factor of 16; the smallest map is larger than the caches near the cores.
SCALING: tuple[tuple[str, Shape], ...] = (
    *(("scaling in N", (N, 128, 56, 56)) for N in (4, 16, 64)),
    *(("scaling in H·W", (16, 128, side, side)) for side in (28, 56, 112)),
)
SMALL: Shape = (2, 16, 4, 4)  # nothing but the cost of the call
REDUCTION = 16

# Passes over the map that the tail cannot do without: forward x, x, shortcut, y; backward gradient,
# x, y, the shortcut's gradient, the same again, x, dx.
PASSES = 11
OURS, COPY = "senet", "copy of the map"


class TailModule(nn.Module):
    """Ours: BN, SE, addition and ReLU through the layer that the networks use."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, REDUCTION)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return residual_tail(x, shortcut, self.bn, self.se)


class TimmTail(nn.Module):
    """The end of timm's residual blocks: their modules, and the same in-place operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.se = optional("timm").layers.SEModule(channels, rd_ratio=1 / REDUCTION)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        y = self.se(self.bn(x))
        y += shortcut
        return self.act(y)


class _BNReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return bn_relu(x, self.bn)


def _contestant(
    name: str, module: nn.Module, shape: Shape, maps: int, at: Setting, *, compiled: bool = False
) -> Contestant:
    """Runs a module on `maps` maps and takes all gradients."""
    module = module.train().to(at.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    call = at.autocast(called(module, compiled=compiled))
    inputs = [at.noise(*shape).requires_grad_() for _ in range(maps)]
    gradient = at.noise(*shape)
    leaves = (*inputs, *module.parameters())

    def run() -> object:
        y = call(*inputs)
        return torch.autograd.grad(y, leaves, gradient.to(y.dtype))

    return Contestant(name, run)


def _copy(shape: Shape, at: Setting) -> Contestant:
    source, target = at.noise(*shape), at.noise(*shape)
    return Contestant(COPY, partial(target.copy_, source), yardstick=True)


def tail_contestants(shape: Shape, at: Setting, *, compiled: bool) -> list[Contestant]:
    """BN → SE → add → ReLU: ours, timm's modules, the same compiled, and the copy."""
    channels = shape[1]
    found = [
        _contestant(OURS, TailModule(channels), shape, 2, at),
        _contestant("timm eager", TimmTail(channels), shape, 2, at),
    ]
    if compiled:
        peer = TimmTail(channels)
        found.append(_contestant("timm compiled", peer, shape, 2, at, compiled=True))
    return [*found, _copy(shape, at)]


def se_contestants(shape: Shape, at: Setting, *, compiled: bool) -> list[Contestant]:
    """SE alone: ours, torchvision's and timm's, and the copy."""
    from torchvision.ops import SqueezeExcitation as TorchvisionSE

    channels = shape[1]
    timm_se = partial(optional("timm").layers.SEModule, channels, rd_ratio=1 / REDUCTION)
    peer = TorchvisionSE(channels, channels // REDUCTION)
    found = [
        _contestant(OURS, SqueezeExcitation(channels, REDUCTION), shape, 1, at),
        _contestant("torchvision", peer, shape, 1, at),
        _contestant("timm", timm_se(), shape, 1, at),
    ]
    if compiled:
        found.append(_contestant("timm compiled", timm_se(), shape, 1, at, compiled=True))
    return [*found, _copy(shape, at)]


def bn_relu_contestants(shape: Shape, at: Setting) -> list[Contestant]:
    """BN → ReLU: ours and PyTorch's modules."""
    channels = shape[1]
    plain = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return [
        _contestant(OURS, _BNReLU(channels), shape, 1, at),
        _contestant("PyTorch eager", plain, shape, 1, at),
        _copy(shape, at),
    ]


def scaling_contestants(shape: Shape, at: Setting) -> list[Contestant]:
    """Our tail and the copy."""
    return [_contestant(OURS, TailModule(shape[1]), shape, 2, at), _copy(shape, at)]


def shape_name(shape: Shape) -> str:
    """`16×256×56×56`."""
    return "×".join(map(str, shape))


def cases(
    settings: Sequence[Setting] = SETTINGS["cpu"],
    shapes: Sequence[Shape] | None = None,
    scaling: Sequence[tuple[str, Shape]] = SCALING,
    *,
    compiled: bool = True,
) -> list[Case]:
    """The cases of `senet bench ops`: the tail, and in float32 its parts and how it scales too.

    Args:
        settings: where and how precisely.
        shapes: (N,C,H,W) of the maps of the tail, of SE alone and of BN → ReLU (default: `SHAPES`).
        scaling: which axis grows, and the shape.
        compiled: whether timm's modules also run under torch.compile.
    """
    tail = ("tail", partial(tail_contestants, compiled=compiled))
    kinds: tuple[tuple[str, Callable[[Shape, Setting], list[Contestant]]], ...] = (
        tail,
        ("SE alone", partial(se_contestants, compiled=compiled)),
        ("BN → ReLU", bn_relu_contestants),
    )
    found = []
    for at in settings:
        all_shapes = SHAPES[at.device] if shapes is None else shapes
        whole = at.precision == "float32"
        work = [
            (kind, shape, make)
            for kind, make in (kinds if whole else (tail,))
            for shape in all_shapes
        ]
        if whole:
            work += [(axis, shape, scaling_contestants) for axis, shape in scaling]
            work += [(kind, SMALL, make) for kind, make in kinds]
        found += [
            Case(at.claim(kind), shape_name(shape), partial(make, shape, at), at)
            for kind, shape, make in work
        ]
    return found


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """What the table amounts to, in a line a claim."""
    small = shape_name(SMALL)
    lines = []
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in measurements:
        if m.contestant not in (OURS, COPY) and m.case != small:
            groups.setdefault((m.benchmark, m.contestant), []).append(m)
    for (benchmark, contestant), rows in groups.items():
        lowest = min(rows, key=lambda m: m.ratio)
        mean = geometric_mean(m.ratio for m in rows)
        lines.append(
            f"{benchmark}: {mean:.2f} times as fast as {contestant} (geometric mean of "
            f"{len(rows)} shapes; lowest {lowest.ratio:.2f} at {lowest.case})"
        )
    for m in measurements:
        if m.benchmark == "tail" and m.contestant == COPY and m.case != small:
            share = 1 / (m.ratio * PASSES / 2)
            lines.append(
                f"tail at {m.case}: {share:.2f} times the time of {PASSES} passes at the copy's "
                "bandwidth"
            )
    for axis in dict.fromkeys(m.benchmark for m in measurements if "scaling" in m.benchmark):
        rows = [m for m in measurements if m.benchmark == axis and m.contestant == OURS]
        costs = ", ".join(f"{1e6 * m.quantiles[1] / _elements(m):.2f} ({m.case})" for m in rows)
        lines.append(f"{axis}: ns an element {costs}")
    return lines


def conclusions_of_tails(measurements: Sequence[Measurement]) -> list[str]:
    """What the table of tails in other precisions than float32 amounts to, a line a row."""
    lines = []
    for m in measurements:
        if m.contestant == COPY:
            size = _elements(m) * (2 if "bf16" in m.benchmark else 4)
            rate = 2 * size / (m.quantiles[1] * 1e6)
            share = 100 * m.ratio * PASSES / 2
            lines.append(
                f"{m.benchmark} at {m.case}: senet runs at {share:.0f}% of the copy's bandwidth "
                f"({rate:.0f} GB/s), counting {PASSES} passes"
            )
        else:
            lines += compared([m])
    return lines


def _elements(m: Measurement) -> int:
    return math.prod(map(int, m.case.split("×")))
