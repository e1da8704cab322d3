"""Inception-ResNet-v2 (arXiv 1602.07261) in TF-slim's structure, with timm's names."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.inception import ConvBNReLU, Kernel, max_pool_half
from senet.models.network import Network, Stage
from senet.models.options import SEOptions, check_dropout, stage_options
from senet.models.registry import register
from senet.models.resnet import initialise
from senet.nn.block import SqueezeExcitation
from senet.support.shapes import Float

# Channels, kernel, stride and padding of each convolution of a branch.
Layer = tuple[int, Kernel] | tuple[int, Kernel, int, int]
_EPS = 1e-3


def _conv(in_channels: int, layer: Layer) -> ConvBNReLU:
    channels, kernel, stride, padding = layer if len(layer) == 4 else (*layer, 1, None)
    return ConvBNReLU(in_channels, channels, kernel, stride, padding, _EPS)


def _branch(in_channels: int, layers: Sequence[Layer]) -> nn.Module:
    """One convolution, or several in a Sequential (timm's names differ in that)."""
    convs = []
    for layer in layers:
        convs.append(_conv(in_channels, layer))
        in_channels = layer[0]
    return convs[0] if len(convs) == 1 else nn.Sequential(*convs)


class _MeanPool(nn.Module):
    """Mean of 3×3 positions; zeros around the map do not count."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Mixed(nn.Module):
    """Branches `branch0`, `branch1` … side by side, and the pooled input if it halves the map.

    Args:
        branches: the branches.
        halve: whether the input, max-pooled with stride 2, is concatenated too.
    """

    def __init__(self, *branches: nn.Module, halve: bool = False) -> None:
        super().__init__()
        self.count = len(branches)
        self.halve = halve
        for index, branch in enumerate(branches):
            self.add_module(f"branch{index}", branch)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """(N, in_channels, H, W) → the concat."""
        outputs = [getattr(self, f"branch{index}")(x) for index in range(self.count)]
        return torch.cat([*outputs, max_pool_half(x)] if self.halve else outputs, 1)


class ResidualMixed(nn.Module):
    """x + scale · SE(1×1 convolution of concatenated branches), then ReLU.

    Args:
        channels: channels of input and output.
        scale: of the residual (section 3.3 of 1602.07261).
        branches: the branches.
        se: SE options, or None for no SE; it stands behind the 1×1, before scale and addition.
        relu: whether a ReLU follows; not in the last block.
    """

    def __init__(
        self,
        channels: int,
        scale: float,
        branches: Sequence[Sequence[Layer]],
        se: SEOptions | None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.relu = relu
        self.count = len(branches)
        for index, layers in enumerate(branches):
            self.add_module(f"branch{index}", _branch(channels, layers))
        self.conv2d = nn.Conv2d(sum(layers[-1][0] for layers in branches), channels, 1)
        self.se: SqueezeExcitation | None = None if se is None else se.block(channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        outputs = [getattr(self, f"branch{index}")(x) for index in range(self.count)]
        out = self.conv2d(torch.cat(outputs, 1))
        out = torch.add(x, out if self.se is None else self.se(out), alpha=self.scale)
        return F.relu(out) if self.relu else out


_BLOCK35: tuple[tuple[Layer, ...], ...] = (
    ((32, 1),),
    ((32, 1), (32, 3)),
    ((32, 1), (48, 3), (64, 3)),
)
_BLOCK17: tuple[tuple[Layer, ...], ...] = (
    ((192, 1),),
    ((128, 1), (160, (1, 7)), (192, (7, 1))),
)
_BLOCK8: tuple[tuple[Layer, ...], ...] = (
    ((192, 1),),
    ((192, 1), (224, (1, 3)), (256, (3, 1))),
)


class InceptionResNetV2(Network):
    """Inception-ResNet-v2: stem, 10 + 20 + 10 residual Inception blocks, three mixed modules.

    Stage 3 are the blocks on the 35×35 map, stage 4 those on 17×17, stage 5 those on 8×8 and the
    last 1×1 convolution.

    Args:
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network; SE stands on each residual branch.
        dropout: share of the pooled features dropped in training.

    Raises:
        ValueError: dropout outside [0, 1).
    """

    head = "classif"

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        se: SEOptions | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        if se is not None:
            se.check_stages((3, 4, 5))
            se.check_integration("standard")
        self.input_size = (in_channels, 299, 299)
        self.min_input_size = 75
        self.conv2d_1a = _conv(in_channels, (32, 3, 2, 0))
        self.conv2d_2a = _conv(32, (32, 3, 1, 0))
        self.conv2d_2b = _conv(32, (64, 3))
        self.conv2d_3b = _conv(64, (80, 1))
        self.conv2d_4a = _conv(80, (192, 3, 1, 0))

        self.mixed_5b = Mixed(
            _branch(192, ((96, 1),)),
            _branch(192, ((48, 1), (64, 5))),
            _branch(192, ((64, 1), (96, 3), (96, 3))),
            nn.Sequential(_MeanPool(), _conv(192, (64, 1))),
        )
        self.repeat = self._blocks(10, 320, 0.17, _BLOCK35, stage_options(se, 3))
        self.mixed_6a = Mixed(
            _branch(320, ((384, 3, 2, 0),)),
            _branch(320, ((256, 1), (256, 3), (384, 3, 2, 0))),
            halve=True,
        )
        self.repeat_1 = self._blocks(20, 1088, 0.10, _BLOCK17, stage_options(se, 4))
        self.mixed_7a = Mixed(
            _branch(1088, ((256, 1), (384, 3, 2, 0))),
            _branch(1088, ((256, 1), (288, 3, 2, 0))),
            _branch(1088, ((256, 1), (288, 3), (320, 3, 2, 0))),
            halve=True,
        )
        self.repeat_2 = self._blocks(9, 2080, 0.20, _BLOCK8, stage_options(se, 5))
        self.block8 = ResidualMixed(2080, 1.0, _BLOCK8, stage_options(se, 5), relu=False)
        self.conv2d_7b = _conv(2080, (1536, 1))
        self.stages = {
            3: Stage(("mixed_5b", "repeat"), 320, 8),
            4: Stage(("mixed_6a", "repeat_1"), 1088, 16),
            5: Stage(("mixed_7a", "repeat_2", "block8", "conv2d_7b"), 1536, 32),
        }
        self.num_features = 1536
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classif = nn.Linear(1536, num_classes) if num_classes else nn.Identity()
        initialise(self)

    @staticmethod
    def _blocks(
        count: int,
        channels: int,
        scale: float,
        branches: Sequence[Sequence[Layer]],
        se: SEOptions | None,
    ) -> nn.Sequential:
        return nn.Sequential(*(ResidualMixed(channels, scale, branches, se) for _ in range(count)))

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What mixed_5b gets of images x (N, in_channels, H, W)."""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(max_pool_half(x)))
        return max_pool_half(x)

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = self.dropout(torch.flatten(self.avgpool(x), 1))
        return x if pre_logits else self.classif(x)


@register()
def inception_resnet_v2(*, dropout: float = 0.2, **common: Any) -> InceptionResNetV2:
    """Inception-ResNet-v2 (table 2)."""
    return InceptionResNetV2(dropout=dropout, **common)
