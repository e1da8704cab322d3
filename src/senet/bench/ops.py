"""What `senet bench ops` compares: the operators against the modules of timm and torchvision.

Everything is float32, channels_last, forward and backward, in training mode, with gradients of all
inputs and parameters. A copy of the same map is the yardstick: it reads and writes the map once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from senet.bench.timing import Case, Contestant, Measurement, geometric_mean
from senet.errors import UserError
from senet.nn.block import SqueezeExcitation
from senet.nn.tails import bn_relu, residual_tail

Shape = tuple[int, int, int, int]

# The last convolution's output in each stage of (SE-)ResNet-50, batch 16.
SHAPES: tuple[Shape, ...] = (
    (16, 256, 56, 56),
    (16, 512, 28, 28),
    (16, 1024, 14, 14),
    (16, 2048, 7, 7),
)
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


def timm_module(name: str) -> Any:
    """Something of timm's by its dotted name, such as "layers.SEModule".

    Raises:
        UserError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError("the peer timm is not installed; run `pip install timm`") from error
    found: Any = timm
    for part in name.split("."):
        found = getattr(found, part)
    return found


class TailModule(nn.Module):
    """Ours: BN, SE, addition and ReLU through the layer that the networks use."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, REDUCTION)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(SE(BN(x)) + shortcut)."""
        return residual_tail(x, shortcut, self.bn, self.se)


class TimmTail(nn.Module):
    """The end of timm's residual blocks: their modules, and the same in-place operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.se = timm_module("layers.SEModule")(channels, rd_ratio=1 / REDUCTION)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(SE(BN(x)) + shortcut)."""
        y = self.se(self.bn(x))
        y += shortcut
        return self.act(y)


class _BNReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return bn_relu(x, self.bn)


def _map(shape: Shape, *, requires_grad: bool = False) -> Tensor:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(requires_grad)


def _forward_backward(
    module: Callable[..., Tensor], parameters: Sequence[nn.Parameter], shape: Shape, maps: int
) -> Callable[[], object]:
    """A call that runs a module on `maps` maps and takes all gradients."""
    inputs = [_map(shape, requires_grad=True) for _ in range(maps)]
    gradient = _map(shape)

    def run() -> object:
        return torch.autograd.grad(module(*inputs), (*inputs, *parameters), gradient)

    return run


def _contestant(
    name: str, module: nn.Module, shape: Shape, maps: int, *, compiled: bool = False
) -> Contestant:
    module = module.train().to(memory_format=torch.channels_last)
    call: Callable[..., Tensor] = module
    if compiled:
        torch.compiler.reset()  # else a second shape compiles for any shape, which is slower
        call = torch.compile(module, dynamic=False)
    run = _forward_backward(call, list(module.parameters()), shape, maps)
    return Contestant(name, run)


def _copy(shape: Shape) -> Contestant:
    source, target = _map(shape), _map(shape)
    return Contestant(COPY, partial(target.copy_, source))


def tail_contestants(shape: Shape, compiled: bool) -> list[Contestant]:
    """BN → SE → add → ReLU: ours, timm's modules, the same compiled, and the copy."""
    channels = shape[1]
    found = [
        _contestant(OURS, TailModule(channels), shape, 2),
        _contestant("timm eager", TimmTail(channels), shape, 2),
    ]
    if compiled:
        peer = TimmTail(channels)
        found.append(_contestant("timm compiled", peer, shape, 2, compiled=True))
    return [*found, _copy(shape)]


def se_contestants(shape: Shape, compiled: bool) -> list[Contestant]:
    """SE alone: ours, torchvision's and timm's, and the copy."""
    from torchvision.ops import SqueezeExcitation as TorchvisionSE

    channels = shape[1]
    timm_se = timm_module("layers.SEModule")
    found = [
        _contestant(OURS, SqueezeExcitation(channels, REDUCTION), shape, 1),
        _contestant("torchvision", TorchvisionSE(channels, channels // REDUCTION), shape, 1),
        _contestant("timm", timm_se(channels, rd_ratio=1 / REDUCTION), shape, 1),
    ]
    if compiled:
        peer = timm_se(channels, rd_ratio=1 / REDUCTION)
        found.append(_contestant("timm compiled", peer, shape, 1, compiled=True))
    return [*found, _copy(shape)]


def bn_relu_contestants(shape: Shape) -> list[Contestant]:
    """BN → ReLU: ours and PyTorch's modules."""
    channels = shape[1]
    plain = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return [
        _contestant(OURS, _BNReLU(channels), shape, 1),
        _contestant("PyTorch eager", plain, shape, 1),
        _copy(shape),
    ]


def scaling_contestants(shape: Shape) -> list[Contestant]:
    """Our tail and the copy."""
    return [_contestant(OURS, TailModule(shape[1]), shape, 2), _copy(shape)]


def shape_name(shape: Shape) -> str:
    """`16×256×56×56`."""
    return "×".join(map(str, shape))


def cases(
    shapes: Sequence[Shape] = SHAPES,
    scaling: Sequence[tuple[str, Shape]] = SCALING,
    *,
    compiled: bool = True,
) -> list[Case]:
    """The cases of `senet bench ops`.

    Args:
        shapes: (N,C,H,W) of the maps of the tail, of SE alone and of BN → ReLU.
        scaling: which axis grows, and the shape.
        compiled: whether timm's modules also run under torch.compile.
    """
    kinds: tuple[tuple[str, Callable[[Shape], list[Contestant]]], ...] = (
        ("tail", partial(tail_contestants, compiled=compiled)),
        ("SE alone", partial(se_contestants, compiled=compiled)),
        ("BN → ReLU", bn_relu_contestants),
    )
    work = [
        *((kind, shape, make) for kind, make in kinds for shape in shapes),
        *((axis, shape, scaling_contestants) for axis, shape in scaling),
        *((kind, SMALL, make) for kind, make in kinds),
    ]
    return [Case(kind, shape_name(shape), partial(make, shape)) for kind, shape, make in work]


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
        costs = ", ".join(f"{_nanoseconds(m):.2f} ({m.case})" for m in rows)
        lines.append(f"{axis}: ns an element {costs}")
    return lines


def _nanoseconds(m: Measurement) -> float:
    elements = 1
    for size in m.case.split("×"):
        elements *= int(size)
    return 1e6 * m.quantiles[1] / elements
