"""ShuffleNet (version 1, arXiv 1707.01083)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.network import Network, Stage
from senet.models.options import SEOptions, stage_options
from senet.models.registry import register
from senet.models.residual import conv
from senet.models.resnet import initialise
from senet.nn.block import SqueezeExcitation
from senet.nn.tails import bn_relu, residual_tail
from senet.support.shapes import Float

# Table 1 of 1707.01083, 3 groups, 1×: channels and units of its stages 2 to 4.
_STAGES: dict[int, tuple[int, int]] = {3: (240, 4), 4: (480, 8), 5: (960, 4)}
_STEM = 24


def channel_shuffle(x: Float[Tensor, "n c h w"], groups: int) -> Float[Tensor, "n c h w"]:
    """Deal the channels of each group out to all groups (figure 1 of 1707.01083)."""
    n, channels, height, width = x.shape
    x = x.view(n, groups, channels // groups, height, width).transpose(1, 2)
    return x.reshape(n, channels, height, width)


class ShuffleUnit(nn.Module):
    """Grouped 1×1, shuffle, 3×3 depthwise, grouped 1×1; added to the input, or concatenated.

    With stride 2 the branch is concatenated to the input's 3×3 average pooling and makes only the
    channels that are missing. SE stands on the branch, behind its last batch norm.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a quarter of them in between.
        stride: 1 (addition) or 2 (concat).
        groups: groups of the 1×1 convolutions.
        first_groups: groups of the first 1×1.
        se: SE options, or None for no SE.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int,
        first_groups: int,
        se: SEOptions | None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.stride = stride
        width = out_channels // 4
        branch_channels = out_channels - in_channels if stride == 2 else out_channels
        self.conv1 = conv(in_channels, width, 1, groups=first_groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, branch_channels, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(branch_channels)
        self.se: SqueezeExcitation | None = None if se is None else se.block(branch_channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, out_channels, H/stride, W/stride); x is not negative."""
        out = channel_shuffle(bn_relu(self.conv1(x), self.bn1), self.groups)
        out = self.conv3(self.bn2(self.conv2(out)))
        if self.stride == 1:
            return residual_tail(out, x, self.bn3, self.se)
        # The ReLU behind the concat has nothing to do on the mean of a map that is not negative.
        return torch.cat([F.avg_pool2d(x, 3, 2, 1), residual_tail(out, None, self.bn3, self.se)], 1)


class ShuffleNet(Network):
    """ShuffleNet 1×: a 3×3 convolution, max pooling and three stages of shuffle units.

    Its stages 2, 3 and 4 are numbered 3, 4 and 5 here, by their strides 8, 16 and 32.

    Args:
        groups: groups of the 1×1 convolutions; the first one of the network has none.
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network.
    """

    def __init__(
        self,
        groups: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        se: SEOptions | None = None,
    ) -> None:
        super().__init__()
        if se is not None:
            se.check_stages(tuple(_STAGES))
            se.check_integration("standard")
        self.input_size = (in_channels, 224, 224)
        self.min_input_size = 32
        self.conv1 = conv(in_channels, _STEM, 3, 2)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = _STEM
        self.stages = {}
        for stage, (out_channels, depth) in _STAGES.items():
            units = []
            for position in range(depth):
                stride = 2 if position == 0 else 1
                first_groups = 1 if channels == _STEM else groups
                options = stage_options(se, stage)
                units.append(
                    ShuffleUnit(channels, out_channels, stride, groups, first_groups, options)
                )
                channels = out_channels
            self.add_module(f"layer{stage - 1}", nn.Sequential(*units))
            self.stages[stage] = Stage((f"layer{stage - 1}",), channels, 2**stage)
        self.num_features = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What the first unit gets of images x (N, in_channels, H, W): (N,24,H/4,W/4)."""
        return self.maxpool(bn_relu(self.conv1(x), self.bn1))

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)


@register()
def shufflenet_g3(**common: Any) -> ShuffleNet:
    """ShuffleNet 1× with 3 groups (table 3)."""
    return ShuffleNet(3, **common)
