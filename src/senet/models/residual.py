"""Residual blocks, and where SE stands in them (figure 5 and section 6.4 of the paper)."""

from abc import abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.options import SEOptions
from senet.nn.block import SqueezeExcitation
from senet.nn.convolution import convolve
from senet.nn.padded_shortcut import PaddedShortcut, beside
from senet.nn.tails import bn_relu, bn_relu_into, residual_tail
from senet.support.shapes import Float


def conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Convolution without bias, padded so that stride 1 keeps the size."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
    )


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What a residual block is made of.

    Attributes:
        in_channels: channels of its input.
        planes: its planes; it has planes · expansion output channels.
        stride: 2 where the block halves the map.
        width: channels of a bottleneck's 3×3 convolution.
        first_width: channels of a bottleneck's first 1×1 convolution.
        groups: groups of a bottleneck's 3×3 convolution.
        projection_kernel: kernel of a projection with stride.
        padded_shortcut: change channels by zero padding and not by a projection.
    """

    in_channels: int
    planes: int
    stride: int
    width: int
    first_width: int
    groups: int = 1
    projection_kernel: int = 1
    padded_shortcut: bool = False


class ResidualBlock(nn.Module):
    """The frame of a residual block: its shortcut and its SE block; subclasses add the branch.

    Args:
        shape: channels and strides.
        se_channels: channels behind the 3×3 convolution that SE_3×3 follows.
        se: SE options, or None for a plain block.
    """

    expansion: int
    projection_bn: bool = True

    def __init__(self, shape: BlockShape, se_channels: int, se: SEOptions | None) -> None:
        super().__init__()
        out_channels = shape.planes * self.expansion
        self.integration = None if se is None else se.integration
        self.se: SqueezeExcitation | None = None
        if se is not None:
            channels = {"pre": shape.in_channels, "3x3": se_channels}
            self.se = se.block(channels.get(se.integration, out_channels))
        self.downsample: nn.Module | None = None
        if shape.stride == 1 and shape.in_channels == out_channels:
            return
        if shape.padded_shortcut:
            self.downsample = PaddedShortcut(shape.in_channels, out_channels, shape.stride)
            return
        kernel = shape.projection_kernel if shape.stride > 1 else 1
        projection = conv(shape.in_channels, out_channels, kernel, shape.stride)
        self.downsample = (
            nn.Sequential(projection, nn.BatchNorm2d(out_channels))
            if self.projection_bn
            else projection
        )

    def se_at(self, place: str) -> SqueezeExcitation | None:
        """The SE block if it stands at `place`."""
        return self.se if self.integration == place else None

    def before_branch(self, x: Tensor) -> Tensor:
        """The branch's input: x, or SE(x) for SE-PRE."""
        se = self.se_at("pre")
        return x if se is None else se(x)

    def first(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The branch's first convolution of the block's input x; what else it left of `shortcut`.

        The map behind `downsample` where it is made beside the convolution, otherwise None.
        """
        both = beside(self.downsample, layer, x) if self.se_at("pre") is None else None
        return (convolve(layer, self.before_branch(x)), None) if both is None else both

    def shortcut(
        self, x: Tensor, downsampled: Tensor | None = None
    ) -> tuple[Tensor, nn.Module | None]:
        """What is added to the branch, and a batch norm it still has to go through.

        The projection's batch norm is left to the block's tail, which adds it in the same pass,
        unless SE stands behind it (SE-Identity).

        Args:
            x: the block's input.
            downsampled: what `first` made of it already.
        """
        bn = None
        if downsampled is not None:
            x = downsampled
        elif isinstance(self.downsample, nn.Sequential):
            x, bn = convolve(self.downsample[0], x), self.downsample[1]
        elif self.downsample is not None:
            x = convolve(self.downsample, x)
        se = self.se_at("identity")
        if se is None:
            return x, bn
        return se(x if bn is None else bn(x)), None

    def finish(
        self, branch: Tensor, bn: nn.Module, x: Tensor, downsampled: Tensor | None = None
    ) -> Tensor:
        """Normalise the branch, add the shortcut of the block's input x, ReLU; SE in its place."""
        shortcut, shortcut_bn = self.shortcut(x, downsampled)
        out = residual_tail(branch, shortcut, bn, self.se_at("standard"), shortcut_bn)
        se = self.se_at("post")
        return out if se is None else se(out)


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions (ResNet-18/34 and CIFAR). SE_3×3 follows the first one.

    Attributes:
        relu_before_se: a further ReLU between the last batch norm and SE, see `ResNet`'s variant
            "cadene".
    """

    expansion = 1
    relu_before_se = False

    def __init__(self, shape: BlockShape, se: SEOptions | None) -> None:
        super().__init__(shape, shape.planes, se)
        self.conv1 = conv(shape.in_channels, shape.planes, 3, shape.stride)
        self.bn1 = nn.BatchNorm2d(shape.planes)
        self.conv2 = conv(shape.planes, shape.planes, 3)
        self.bn2 = nn.BatchNorm2d(shape.planes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, planes, H/stride, W/stride)."""
        out, downsampled = self.first(self.conv1, x)
        out = bn_relu_into(out, self.bn1, self.conv2, self.se_at("3x3"))
        se = self.se_at("standard")
        if se is None or not self.relu_before_se:
            return self.finish(out, self.bn2, x, downsampled)
        shortcut, shortcut_bn = self.shortcut(x, downsampled)
        if shortcut_bn is not None:
            shortcut = shortcut_bn(shortcut)
        return F.relu(se(bn_relu(out, self.bn2)) + shortcut)


class Bottleneck(ResidualBlock):
    """1×1, 3×3 (grouped in ResNeXt) and 1×1 convolution."""

    expansion = 4

    def __init__(self, shape: BlockShape, se: SEOptions | None) -> None:
        super().__init__(shape, shape.width, se)
        self.conv1 = conv(shape.in_channels, shape.first_width, 1)
        self.bn1 = nn.BatchNorm2d(shape.first_width)
        self.conv2 = conv(shape.first_width, shape.width, 3, shape.stride, shape.groups)
        self.bn2 = nn.BatchNorm2d(shape.width)
        self.conv3 = conv(shape.width, shape.planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(shape.planes * self.expansion)
        self.stride = shape.stride

    def place_stride(self, *, first: bool) -> None:
        """Let the first 1×1 convolution stride, or the 3×3; a grouped 3×3 always keeps it."""
        first = first and self.conv2.groups == 1
        strides = (self.stride, 1) if first else (1, self.stride)
        for layer, stride in zip((self.conv1, self.conv2), strides, strict=True):
            layer.stride = (stride, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, 4·planes, H/stride, W/stride)."""
        out = bn_relu_into(convolve(self.conv1, self.before_branch(x)), self.bn1, self.conv2)
        out = bn_relu_into(out, self.bn2, self.conv3, self.se_at("3x3"))
        return self.finish(out, self.bn3, x)


class PreActivationBlock(ResidualBlock):
    """BN and ReLU before each convolution (He et al., arXiv 1603.05027).

    The branch ends in a convolution: standard SE follows it, and nothing follows the addition.
    A shortcut that changes the shape takes the activated input, the identity the input itself.
    """

    projection_bn = False

    def __init__(self, shape: BlockShape, se_channels: int, se: SEOptions | None) -> None:
        super().__init__(shape, se_channels, se)
        self.bn1 = nn.BatchNorm2d(shape.in_channels)

    @abstractmethod
    def branch(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """The residual branch behind its first batch norm and ReLU."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, planes · expansion, H/stride, W/stride)."""
        activated = bn_relu(x, self.bn1)
        shortcut, _ = self.shortcut(x if self.downsample is None else activated)
        out = self.branch(self.before_branch(activated))
        se = self.se_at("standard")
        out = shortcut + (out if se is None else se(out))
        se = self.se_at("post")
        return out if se is None else se(out)


class PreActivationBasicBlock(PreActivationBlock):
    """Two 3×3 convolutions, for Wide ResNet and ResNet-110. SE_3×3 follows the first one."""

    expansion = 1

    def __init__(self, shape: BlockShape, se: SEOptions | None) -> None:
        super().__init__(shape, shape.planes, se)
        self.conv1 = conv(shape.in_channels, shape.planes, 3, shape.stride)
        self.bn2 = nn.BatchNorm2d(shape.planes)
        self.conv2 = conv(shape.planes, shape.planes, 3)

    def branch(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, planes, H/stride, W/stride)."""
        return bn_relu_into(convolve(self.conv1, x), self.bn2, self.conv2, self.se_at("3x3"))


class PreActivationBottleneck(PreActivationBlock):
    """1×1, 3×3 and 1×1 convolution, for ResNet-164."""

    expansion = 4

    def __init__(self, shape: BlockShape, se: SEOptions | None) -> None:
        super().__init__(shape, shape.width, se)
        self.conv1 = conv(shape.in_channels, shape.first_width, 1)
        self.bn2 = nn.BatchNorm2d(shape.first_width)
        self.conv2 = conv(shape.first_width, shape.width, 3, shape.stride, shape.groups)
        self.bn3 = nn.BatchNorm2d(shape.width)
        self.conv3 = conv(shape.width, shape.planes * self.expansion, 1)

    def branch(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, 4·planes, H/stride, W/stride)."""
        x = bn_relu_into(convolve(self.conv1, x), self.bn2, self.conv2)
        return bn_relu_into(x, self.bn3, self.conv3, self.se_at("3x3"))
