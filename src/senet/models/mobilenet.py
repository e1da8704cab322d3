"""MobileNet (version 1, arXiv 1704.04861)."""

from typing import Any

import torch
from torch import Tensor, nn

from senet.models.network import Network, Stage
from senet.models.options import SEOptions, stage_options
from senet.models.registry import register
from senet.models.residual import conv
from senet.models.resnet import initialise
from senet.nn.block import SqueezeExcitation
from senet.nn.tails import bn_relu, residual_tail
from senet.support.shapes import Float

# Table 1 of 1704.04861: channels of the pointwise convolutions; the first of a stage strides.
_STAGES: dict[int, tuple[int, ...]] = {
    1: (64,),
    2: (128, 128),
    3: (256, 256),
    4: (512, 512, 512, 512, 512, 512),
    5: (1024, 1024),
}


class SeparableConv(nn.Module):
    """3×3 depthwise and 1×1 pointwise convolution, each with batch norm and ReLU.

    SE stands behind the pointwise convolution's batch norm, before its ReLU: the place of a
    residual block without its addition, so that the same fused tail serves.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, se: SEOptions | None
    ) -> None:
        super().__init__()
        self.depthwise = conv(in_channels, in_channels, 3, stride, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = conv(in_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.se: SqueezeExcitation | None = None if se is None else se.block(out_channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → (N, out_channels, H/stride, W/stride)."""
        x = bn_relu(self.depthwise(x), self.bn1)
        return residual_tail(self.pointwise(x), None, self.bn2, self.se)


class MobileNet(Network):
    """MobileNet: a 3×3 convolution and 13 separable ones.

    Args:
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network.
        width: width multiplier (section 3.3 of 1704.04861): channels are multiplied by it and
            rounded down, to 8 at least.

    Raises:
        ValueError: width that is not positive.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        se: SEOptions | None = None,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(width, int | float) or not width > 0:
            raise ValueError(f"width must be a positive number, got {width!r}")
        if se is not None:
            se.check_stages(tuple(_STAGES))
            se.check_integration("standard")
        self.input_size = (in_channels, 224, 224)
        self.min_input_size = 32
        channels = max(8, int(32 * width))
        self.conv1 = conv(in_channels, channels, 3, 2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = {}
        for stage, widths in _STAGES.items():
            blocks = []
            for position, full in enumerate(widths):
                out_channels = max(8, int(full * width))
                stride = 2 if position == 0 and stage > 1 else 1
                options = stage_options(se, stage)
                blocks.append(SeparableConv(channels, out_channels, stride, options))
                channels = out_channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.stages[stage] = Stage((f"layer{stage}",), channels, 2**stage)
        self.num_features = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What the first separable convolution gets of images x (N, in_channels, H, W)."""
        return bn_relu(self.conv1(x), self.bn1)

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)


@register()
def mobilenet(*, width: float = 1.0, **common: Any) -> MobileNet:
    """MobileNet (table 3)."""
    return MobileNet(width=width, **common)
