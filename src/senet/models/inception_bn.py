"""BN-Inception (arXiv 1502.03167) in the structure of the released SE-BN-Inception.

Modules are named as in Caffe and `pretrainedmodels` (`inception_3a` … `inception_5b`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.models.inception import (
    Branch,
    Conv,
    ConvBNReLU,
    InceptionModule,
    average_pool,
    max_pool_half_ceil,
    max_pool_same,
)
from senet.models.network import Network, Stage
from senet.models.options import SEOptions, stage_options
from senet.models.registry import register
from senet.models.resnet import initialise
from senet.support.shapes import Float

# The authors' Caffe definition: 1×1 | 3×3 reduce, 3×3 | double 3×3 reduce, a, b | pool, projection.
# A module without 1×1 halves the map, and its pooled input passes without a projection.
_MODULES: dict[int, dict[str, tuple[int, tuple[int, int], tuple[int, int, int], int]]] = {
    3: {
        "3a": (64, (64, 64), (64, 96, 96), 32),
        "3b": (64, (64, 96), (64, 96, 96), 64),
    },
    4: {
        "3c": (0, (128, 160), (64, 96, 96), 0),
        "4a": (224, (64, 96), (96, 128, 128), 128),
        "4b": (192, (96, 128), (96, 128, 128), 128),
        "4c": (160, (128, 160), (128, 160, 160), 128),
        "4d": (96, (128, 192), (160, 192, 192), 128),
    },
    5: {
        "4e": (0, (128, 192), (192, 256, 256), 0),
        "5a": (352, (192, 320), (160, 224, 224), 128),
        "5b": (352, (192, 320), (192, 224, 224), 128),
    },
}


def _branches(
    one: int, three: tuple[int, int], double: tuple[int, int, int], projection: int, pool_max: bool
) -> list[Branch]:
    stride = 1 if one else 2
    branches = [
        Branch((Conv("conv_3x3_reduce", three[0], 1), Conv("conv_3x3", three[1], 3, stride))),
        Branch(
            (
                Conv("double_3x3_reduce", double[0], 1),
                Conv("double_3x3_1", double[1], 3),
                Conv("double_3x3_2", double[2], 3, stride),
            )
        ),
    ]
    if not one:
        return [*branches, Branch(pool=max_pool_half_ceil)]
    pool = max_pool_same if pool_max else average_pool
    projected = Branch((Conv("pool_proj", projection, 1),), pool)
    return [Branch((Conv("conv_1x1", one, 1),)), *branches, projected]


class BNInception(Network):
    """BN-Inception: a stem of three convolutions and ten Inception modules.

    A module that halves the map begins the stage of its output's stride: 3c belongs to stage 4
    and 4e to stage 5.

    Args:
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network; SE stands behind each concat.
    """

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, se: SEOptions | None = None
    ) -> None:
        super().__init__()
        if se is not None:
            se.check_stages(tuple(_MODULES))
            se.check_integration("standard")
        self.input_size = (in_channels, 224, 224)
        self.min_input_size = 32
        self.conv1 = ConvBNReLU(in_channels, 64, 7, 2)
        self.conv2_reduce = ConvBNReLU(64, 64, 1)
        self.conv2 = ConvBNReLU(64, 192, 3)
        channels = 192
        self.stages = {}
        for stage, modules in _MODULES.items():
            for name, widths in modules.items():
                branches = _branches(*widths, pool_max=name == "5b")
                module = InceptionModule(channels, branches, stage_options(se, stage))
                self.add_module(f"inception_{name}", module)
                channels = module.out_channels
            children = tuple(f"inception_{name}" for name in modules)
            self.stages[stage] = Stage(children, channels, 2**stage)
        self.num_features = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What module 3a gets of images x (N, in_channels, H, W): (N,192,H/8,W/8)."""
        x = F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = self.conv2(self.conv2_reduce(x))
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)


@register()
def bn_inception(**common: Any) -> BNInception:
    """BN-Inception (table 2)."""
    return BNInception(**common)
