"""Inception modules: parallel branches of convolutions, a concat, and SE behind it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.options import SEOptions
from senet.nn.block import SqueezeExcitation, hooked
from senet.nn.branches import joined
from senet.nn.tails import bn_relu
from senet.support.shapes import Float

Pool = Callable[[Tensor], Tensor]
Kernel = int | tuple[int, int]


def _pair(kernel: Kernel) -> tuple[int, int]:
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: height and width of the kernel, or one number for both.
        stride: stride of the convolution.
        padding: rows and columns of zeros around the map; by default stride 1 keeps the size.
        eps: of the batch norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Kernel,
        stride: int = 1,
        padding: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        height, width = _pair(kernel)
        around = (height // 2, width // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(
            in_channels, out_channels, (height, width), stride, around, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, out_channels, …)."""
        return bn_relu(self.conv(x), self.bn)


@dataclass(frozen=True)
class Conv:
    """A convolution of a branch: its name in the module, channels, and `ConvBNReLU`'s rest."""

    name: str
    channels: int
    kernel: Kernel
    stride: int = 1
    padding: int | None = None


@dataclass(frozen=True)
class Branch:
    """One way through an Inception module.

    Attributes:
        convs: convolutions, one after the other.
        pool: pooling before them.
        fork: convolutions side by side behind them, whose outputs are concatenated.
    """

    convs: tuple[Conv, ...] = ()
    pool: Pool | None = None
    fork: tuple[Conv, ...] = ()


class InceptionModule(nn.Module):
    """Branches side by side, concatenated; SE on the concat (figure 2 of the paper).

    Args:
        in_channels: channels of the input.
        branches: the branches, in the order of the concat.
        se: SE options; None for no SE.
        eps: of the batch norms.

    Attributes:
        out_channels: channels of the output.
    """

    def __init__(
        self, in_channels: int, branches: Sequence[Branch], se: SEOptions | None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.branches = tuple(branches)
        self.out_channels = 0
        for branch in self.branches:
            channels = in_channels
            for conv in branch.convs:
                self._add(channels, conv, eps)
                channels = conv.channels
            for conv in branch.fork:
                self._add(channels, conv, eps)
            self.out_channels += sum(conv.channels for conv in branch.fork) or channels
        self.se: SqueezeExcitation | None = None if se is None else se.block(self.out_channels)

    def _add(self, in_channels: int, conv: Conv, eps: float) -> None:
        layer = ConvBNReLU(in_channels, conv.channels, conv.kernel, conv.stride, conv.padding, eps)
        self.add_module(conv.name, layer)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, out_channels, …)."""
        ends: list[tuple[Tensor, nn.Module | None]] = []
        for branch in self.branches:
            y = x if branch.pool is None else branch.pool(x)
            last = branch.fork or branch.convs[-1:]
            for conv in branch.convs[: len(branch.convs) - (not branch.fork)]:
                y = getattr(self, conv.name)(y)
            ends += [_end(getattr(self, conv.name), y) for conv in last] or [(y, None)]
        return joined(ends, self.se)


def _end(layer: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """What a branch's last layer makes of x, up to its batch norm, and that; see `joined`."""
    if type(layer) is ConvBNReLU and not hooked(layer):
        return layer.conv(x), layer.bn
    return layer(x), None


def average_pool(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Mean of 3×3 positions; zeros around the map count."""
    return F.avg_pool2d(x, 3, 1, 1)


def max_pool_same(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Maximum of 3×3 positions, same size."""
    return F.max_pool2d(x, 3, 1, 1)


def max_pool_half(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c a b"]:
    """Maximum of 3×3 positions at every second one that has all its neighbours."""
    return F.max_pool2d(x, 3, 2)


def max_pool_half_ceil(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c a b"]:
    """Maximum of 3×3 positions, size ⌈H/2⌉ × ⌈W/2⌉ as of a padded convolution with stride 2.

    For even sizes Caffe's pooling in ceil mode. Caffe makes an odd size smaller by one than the
    convolutions beside it and stops; here the windows go on over the edge.
    """
    height, width = x.shape[-2:]
    x = F.pad(x, (0, width % 2, 0, height % 2), value=-torch.inf)
    return F.max_pool2d(x, 3, 2, ceil_mode=True)
