"""What `senet bench convolutions` compares: each pass of a training step's convolutions.

Ours stand against PyTorch's (oneDNN's) where there are kernels; elsewhere PyTorch's stand alone. A
product of matrices is the yardstick: what the processor reaches at best. float32, channels_last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from senet import ops
from senet.bench.setting import ON_CPU
from senet.bench.timing import Case, Contestant, Measurement, geometric_mean
from senet.ops import convolution

OURS, PEER, PRODUCT = "senet", "PyTorch", "product of matrices"
PASSES = ("forward", "gradient of the input", "gradient of the weights")
_SIDE = 1024  # of the matrices


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Attributes:
        batch, channels, side: of its input (N,C,H,H).
        outputs: channels of its output.
        kernel, stride, groups: of the convolution, whose padding is kernel // 2.
    """

    batch: int
    channels: int
    outputs: int
    side: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def output_side(self) -> int:
        """Height and width of the output."""
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def flops(self) -> int:
        """Of one pass; a multiplication and an addition count two."""
        terms = self.channels // self.groups * self.kernel**2
        return 2 * self.batch * self.outputs * self.output_side**2 * terms

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        kernel = f"{self.kernel}×{self.kernel}{stride}"
        return f"{kernel} {self.channels}→{self.outputs}{groups}, {self.batch}×{self.side}²"


# Of ResNet-20 at batch 128, ResNet-50 and ResNeXt-50 32×4d at batch 8, EfficientNet-B0 at batch 8.
LAYERS = (
    *(Layer(128, c, c, side, 3) for c, side in ((16, 32), (32, 16), (64, 8))),
    *(Layer(8, c, c, side, 3) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
    Layer(128, 3, 16, 32, 3),
    Layer(8, 3, 64, 224, 7, 2),
    *(Layer(128, c, 2 * c, side, 3, 2) for c, side in ((16, 32), (32, 16))),
    *(Layer(8, c, c, side, 3, 2) for c, side in ((128, 56), (256, 28), (512, 14))),
    *(Layer(8, c, 4 * c, side, 1) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(Layer(8, 4 * c, c, side, 1) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(Layer(8, c, c, side, 3, 1, 32) for c, side in ((128, 56), (256, 28), (512, 14), (1024, 7))),
    *(Layer(8, c, c, side, 3, 1, c) for c, side in ((32, 112), (480, 14))),
    *(Layer(8, c, c, side, 5, 1, c) for c, side in ((240, 28), (672, 14), (1152, 7))),
)

Call = Callable[[], object]


def cases(layers: Sequence[Layer] = LAYERS) -> list[Case]:
    """A case for each pass of each layer.

    Args:
        layers: what to measure.
    """
    return [
        Case(name, str(layer), partial(_contestants, layer, index), ON_CPU)
        for layer in layers
        for index, name in enumerate(PASSES)
        if index != 1 or layer.channels > 3  # images have no gradient
    ]


def _contestants(layer: Layer, index: int) -> list[Contestant]:
    x = ON_CPU.noise(layer.batch, layer.channels, layer.side, layer.side)
    shape = layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel
    weight = ON_CPU.noise(*shape)
    gradient = ON_CPU.noise(layer.batch, layer.outputs, layer.output_side, layer.output_side)
    a, b = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    ours = _ours(layer, x, weight, gradient)[index]
    found = [] if ours is None else [Contestant(OURS, ours)]
    found.append(Contestant(PEER, _peers(layer, x, weight, gradient)[index]))
    return [*found, Contestant(PRODUCT, partial(torch.mm, a, b), yardstick=True)]


def _peers(layer: Layer, x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Call, Call, Call]:
    sides = [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1]

    def back(*wanted: bool) -> object:
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *sides, False, [0, 0], layer.groups, wanted
        )

    return (
        lambda: torch.conv2d(x, weight, None, *sides, layer.groups),
        partial(back, True, False, False),
        partial(back, False, True, False),
    )


def _ours(layer: Layer, x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Call | None, ...]:
    """The three passes in our kernels; None for one that these do not compute."""
    stride, padding = layer.stride, layer.kernel // 2
    if layer.groups == layer.channels > 1:
        return _depthwise(layer, x, weight, gradient)
    shapes = tuple(x.shape), tuple(weight.shape), (stride, stride), (padding, padding)
    with convolution.use("senet"):
        able = convolution.passes(*shapes, layer.groups)

    def forward() -> object:
        with convolution.use("senet"):
            return convolution.convolve(
                x, weight, stride=stride, padding=padding, groups=layer.groups
            )

    def back(*wanted: bool) -> object:
        with convolution.use("senet"):
            return torch.ops.senet.convolution_backward(
                gradient, x, weight, [stride] * 2, [padding] * 2, layer.groups, wanted
            )

    calls: tuple[Call, ...] = (forward, partial(back, True, False), partial(back, False, True))
    return tuple(call if there else None for call, there in zip(calls, able, strict=True))


def _depthwise(
    layer: Layer, x: Tensor, weight: Tensor, gradient: Tensor
) -> tuple[Call, Call, Call]:
    _, packed = torch.ops.senet.depthwise(x, weight, layer.stride, layer.kernel // 2)

    def back(*wanted: bool) -> object:
        return torch.ops.senet.depthwise_backward(
            gradient, x, weight, packed, layer.stride, layer.kernel // 2, wanted
        )

    return (
        lambda: ops.depthwise(x, weight, layer.stride, layer.kernel // 2),
        partial(back, True, False),
        partial(back, False, True),
    )


def conclusions(measurements: Sequence[Measurement], layers: Sequence[Layer] = LAYERS) -> list[str]:
    """Each pass's speed in GFLOP/s and as a share of the product's, and ours against PyTorch's.

    Args:
        measurements: of `cases(layers)`, or of some of them.
        layers: whose measurements these are.
    """
    flops = {str(layer): layer.flops for layer in layers}
    times: dict[tuple[str, str], dict[str, Measurement]] = {}
    for m in measurements:
        times.setdefault((m.case, m.benchmark), {})[m.contestant] = m
    lines, ratios = [], {}
    for (case, name), rows in times.items():
        peak = 2 * _SIDE**3 / rows[PRODUCT].quantiles[1]
        rate = flops[case] / rows[PEER].quantiles[1]
        text = f"{case}, {name}: PyTorch {rate / 1e6:.0f} GFLOP/s ({rate / peak:.0%} of a product)"
        if OURS in rows:
            ratios[case, name] = rows[PEER].ratio
            text += f", senet {rows[PEER].ratio:.2f} times as fast"
        lines.append(text)
    for name in PASSES:
        found = [ratio for (_, each), ratio in ratios.items() if each == name]
        if found:
            lines.append(
                f"{name}: senet is {geometric_mean(found):.2f} times as fast as PyTorch (geometric "
                f"mean of {len(found)} layers; lowest {min(found):.2f})"
            )
    return lines
