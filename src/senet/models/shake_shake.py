"""Shake-Shake networks for CIFAR (Gastaldi, arXiv 1705.07485).

Two residual branches are mixed with random weights, drawn anew for each image and block:
α in the forward pass and, independently, β in the backward pass ("Shake"), or 1/2 in the backward
pass ("Even"). In evaluation the weights are 1/2.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.network import Network, Stage
from senet.models.options import SEOptions, stage_options
from senet.models.registry import register
from senet.models.residual import conv
from senet.models.resnet import initialise
from senet.nn.block import SqueezeExcitation
from senet.nn.tails import bn_relu
from senet.support.shapes import Float

Backward = Literal["shake", "even"]


def mix(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], backward: Backward
) -> Float[Tensor, "n c h w"]:
    """α·a + (1 − α)·b with gradients β and 1 − β; α and β uniform in [0, 1), one per image.

    Args:
        a: one branch.
        b: the other one, same shape.
        backward: "shake" draws β independently of α, "even" takes 1/2.

    Returns:
        The mixture, same shape and dtype.
    """
    shape = (a.shape[0], *[1] * (a.ndim - 1))
    alpha = torch.rand(shape, device=a.device, dtype=a.dtype)
    beta = 0.5 if backward == "even" else torch.rand(shape, device=a.device, dtype=a.dtype)
    # Forward sees the second term turn the first one into α's mixture, backward does not.
    backward_mixture = b + beta * (a - b)
    with torch.no_grad():
        correction = (alpha - beta) * (a - b)
    return backward_mixture + correction


class ShiftedShortcut(nn.Module):
    """Halves the map: even positions give half the channels, odd ones the other half.

    Without stride a 1×1 convolution and batch norm (section 2.1 and figure 1 of 1705.07485).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = out_channels // 2
        self.conv1 = conv(in_channels, out_channels if stride == 1 else half, 1)
        self.conv2 = conv(in_channels, out_channels - half, 1) if stride > 1 else None
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if self.conv2 is None:
            return self.bn(self.conv1(x))
        even = self.conv1(x[:, :, ::2, ::2])
        # Zeros come in at the far edge.
        odd = self.conv2(F.pad(x, (0, 1, 0, 1))[:, :, 1::2, 1::2])
        return self.bn(torch.cat([even, odd], 1))


class ShakeBranch(nn.Module):
    """One residual branch: ReLU and convolutions, each with batch norm, ReLU between them.

    Two 3×3 convolutions for `groups=0`; else a bottleneck of 1×1, grouped 3×3 and 1×1, whose
    inner width is `width`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, stride: int, groups: int
    ) -> None:
        super().__init__()
        if groups:
            self.conv1 = conv(in_channels, width, 1)
            self.conv2 = conv(width, width, 3, stride, groups)
            self.bn2: nn.Module | None = nn.BatchNorm2d(width)
            self.conv3: nn.Module | None = conv(width, out_channels, 1)
        else:
            self.conv1 = conv(in_channels, width, 3, stride)
            self.conv2 = conv(width, out_channels, 3)
            self.bn2 = self.conv3 = None
        self.bn1 = nn.BatchNorm2d(width)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        x = self.conv2(bn_relu(self.conv1(x), self.bn1))
        if self.conv3 is not None and self.bn2 is not None:
            x = self.conv3(bn_relu(x, self.bn2))
        return self.bn(x)


class ShakeBlock(nn.Module):
    """Shortcut + SE(mixture of two branches).

    One SE block stands on the mixture, before the addition: the mixture is what takes the place
    of the residual branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        stride: int,
        groups: int,
        backward: Backward,
        se: SEOptions | None,
    ) -> None:
        super().__init__()
        self.backward_mode: Backward = backward
        self.branch1 = ShakeBranch(in_channels, out_channels, width, stride, groups)
        self.branch2 = ShakeBranch(in_channels, out_channels, width, stride, groups)
        same = stride == 1 and in_channels == out_channels
        self.downsample = None if same else ShiftedShortcut(in_channels, out_channels, stride)
        self.se: SqueezeExcitation | None = None if se is None else se.block(out_channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, out_channels, H/stride, W/stride), not activated."""
        activated = torch.relu(x)
        a, b = self.branch1(activated), self.branch2(activated)
        out = mix(a, b, self.backward_mode) if self.training else 0.5 * (a + b)
        if self.se is not None:
            out = self.se(out)
        return out + (x if self.downsample is None else self.downsample(activated))


class ShakeShake(Network):
    """Shake-Shake network: a 3×3 convolution and three stages of blocks with two branches.

    Args:
        depth: blocks in each stage.
        width: inner channels of a branch in the first stage; doubles from stage to stage.
        groups: groups of a bottleneck's 3×3; 0 for two 3×3 convolutions.
        backward: weights of the backward pass, see `mix`.
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        groups: int,
        backward: Backward,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        se: SEOptions | None = None,
    ) -> None:
        super().__init__()
        numbers = (2, 3, 4)
        if se is not None:
            se.check_stages(numbers)
            se.check_integration("standard")
        self.input_size = (in_channels, 32, 32)
        self.min_input_size = 4
        self.conv1 = conv(in_channels, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        self.stages = {}
        for index, stage in enumerate(numbers):
            inner = width * 2**index
            blocks = []
            for position in range(depth):
                stride = 2 if position == 0 and index > 0 else 1
                options = stage_options(se, stage)
                blocks.append(ShakeBlock(channels, inner, inner, stride, groups, backward, options))
                channels = inner
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            self.stages[stage] = Stage((f"layer{index + 1}",), channels, 2**index)
        self.num_features = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What the first block gets of images x (N, in_channels, H, W)."""
        return self.bn1(self.conv1(x))

    def forward_stage(self, stage: int, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        x = super().forward_stage(stage, x)
        return torch.relu(x) if stage == max(self.stages) else x

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)


@register()
def shake_shake26_2x96d_cifar(**common: Any) -> ShakeShake:
    """Shake-Shake 26 2×96d for 32×32 images (table 4)."""
    return ShakeShake(4, 96, 0, "shake", **common)


@register()
def shake_even29_2x4x64d_cifar(**common: Any) -> ShakeShake:
    """Shake-Even 29 2×4×64d for 32×32 images (table 5): ResNeXt bottlenecks, β = 1/2."""
    return ShakeShake(3, 4 * 64, 4, "even", **common)
