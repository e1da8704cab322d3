"""Inception-v3 (arXiv 1512.00567) in torchvision's structure and with its names."""

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
    max_pool_half,
)
from senet.models.network import Network, Stage
from senet.models.options import SEOptions, check_dropout, stage_options
from senet.models.registry import register
from senet.models.resnet import initialise
from senet.support.shapes import Float

_EPS = 1e-3
_ROW, _COLUMN = (1, 7), (7, 1)


def _grid_35(projection: int) -> list[Branch]:
    """Figure 5 of 1512.00567, with a 5×5 beside the factorised one."""
    return [
        Branch((Conv("branch1x1", 64, 1),)),
        Branch((Conv("branch5x5_1", 48, 1), Conv("branch5x5_2", 64, 5))),
        Branch(
            (
                Conv("branch3x3dbl_1", 64, 1),
                Conv("branch3x3dbl_2", 96, 3),
                Conv("branch3x3dbl_3", 96, 3),
            )
        ),
        Branch((Conv("branch_pool", projection, 1),), average_pool),
    ]


def _reduce_35() -> list[Branch]:
    """Figure 10: from 35×35 to 17×17."""
    return [
        Branch((Conv("branch3x3", 384, 3, 2, 0),)),
        Branch(
            (
                Conv("branch3x3dbl_1", 64, 1),
                Conv("branch3x3dbl_2", 96, 3),
                Conv("branch3x3dbl_3", 96, 3, 2, 0),
            )
        ),
        Branch(pool=max_pool_half),
    ]


def _grid_17(width: int) -> list[Branch]:
    """Figure 6 with n = 7: rows and columns in place of squares."""
    return [
        Branch((Conv("branch1x1", 192, 1),)),
        Branch(
            (
                Conv("branch7x7_1", width, 1),
                Conv("branch7x7_2", width, _ROW),
                Conv("branch7x7_3", 192, _COLUMN),
            )
        ),
        Branch(
            (
                Conv("branch7x7dbl_1", width, 1),
                Conv("branch7x7dbl_2", width, _COLUMN),
                Conv("branch7x7dbl_3", width, _ROW),
                Conv("branch7x7dbl_4", width, _COLUMN),
                Conv("branch7x7dbl_5", 192, _ROW),
            )
        ),
        Branch((Conv("branch_pool", 192, 1),), average_pool),
    ]


def _reduce_17() -> list[Branch]:
    """From 17×17 to 8×8."""
    return [
        Branch((Conv("branch3x3_1", 192, 1), Conv("branch3x3_2", 320, 3, 2, 0))),
        Branch(
            (
                Conv("branch7x7x3_1", 192, 1),
                Conv("branch7x7x3_2", 192, _ROW),
                Conv("branch7x7x3_3", 192, _COLUMN),
                Conv("branch7x7x3_4", 192, 3, 2, 0),
            )
        ),
        Branch(pool=max_pool_half),
    ]


def _grid_8() -> list[Branch]:
    """Figure 7: the branches fork into rows and columns."""
    return [
        Branch((Conv("branch1x1", 320, 1),)),
        Branch(
            (Conv("branch3x3_1", 384, 1),),
            fork=(Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))),
        ),
        Branch(
            (Conv("branch3x3dbl_1", 448, 1), Conv("branch3x3dbl_2", 384, 3)),
            fork=(Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        Branch((Conv("branch_pool", 192, 1),), average_pool),
    ]


_MODULES: dict[int, dict[str, list[Branch]]] = {
    3: {"Mixed_5b": _grid_35(32), "Mixed_5c": _grid_35(64), "Mixed_5d": _grid_35(64)},
    4: {
        "Mixed_6a": _reduce_35(),
        "Mixed_6b": _grid_17(128),
        "Mixed_6c": _grid_17(160),
        "Mixed_6d": _grid_17(160),
        "Mixed_6e": _grid_17(192),
    },
    5: {"Mixed_7a": _reduce_17(), "Mixed_7b": _grid_8(), "Mixed_7c": _grid_8()},
}


class AuxiliaryClassifier(nn.Module):
    """Classifier on the 17×17 map, for training (figure 8); needs maps of at least 17×17."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = ConvBNReLU(in_channels, 128, 1, eps=_EPS)
        self.conv1 = ConvBNReLU(128, 768, 5, padding=0, eps=_EPS)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of the map x."""
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, 3)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InceptionV3(Network):
    """Inception-v3: a stem of five convolutions and eleven Inception modules.

    Mixed_5b-d make stage 3, Mixed_6a-e stage 4, Mixed_7a-c stage 5.

    Args:
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network; SE stands behind each concat.
        aux: with an auxiliary classifier, see `forward_with_aux`; it makes 13% of torchvision's
            parameters and has no part in `forward`.
        dropout: share of the pooled features dropped in training.

    Raises:
        ValueError: dropout outside [0, 1), or `aux` without classes.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        se: SEOptions | None = None,
        aux: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        if aux and not num_classes:
            raise ValueError("aux needs classes, got num_classes=0")
        if se is not None:
            se.check_stages(tuple(_MODULES))
            se.check_integration("standard")
        self.input_size = (in_channels, 299, 299)
        self.min_input_size = 75
        self.Conv2d_1a_3x3 = ConvBNReLU(in_channels, 32, 3, 2, 0, _EPS)
        self.Conv2d_2a_3x3 = ConvBNReLU(32, 32, 3, 1, 0, _EPS)
        self.Conv2d_2b_3x3 = ConvBNReLU(32, 64, 3, eps=_EPS)
        self.Conv2d_3b_1x1 = ConvBNReLU(64, 80, 1, eps=_EPS)
        self.Conv2d_4a_3x3 = ConvBNReLU(80, 192, 3, 1, 0, _EPS)
        channels = 192
        self.stages = {}
        for stage, modules in _MODULES.items():
            for name, branches in modules.items():
                module = InceptionModule(channels, branches, stage_options(se, stage), _EPS)
                self.add_module(name, module)
                channels = module.out_channels
            self.stages[stage] = Stage(tuple(modules), channels, 2**stage)
        self.AuxLogits = AuxiliaryClassifier(768, num_classes) if aux else None
        self.num_features = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def make_classifier(self, num_classes: int) -> None:
        super().make_classifier(num_classes)
        if self.AuxLogits is not None and not num_classes:  # it has classes or is not there
            self.AuxLogits = None
            self.config = {**self.config, "options": {**self.config["options"], "aux": False}}
        elif self.AuxLogits is not None:
            self.AuxLogits.fc = nn.Linear(self.AuxLogits.fc.in_features, num_classes)

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What Mixed_5b gets of images x (N, in_channels, H, W)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool_half(x)))
        return max_pool_half(x)

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = self.dropout(torch.flatten(self.avgpool(x), 1))
        return x if pre_logits else self.fc(x)

    def forward_with_aux(
        self, x: Float[Tensor, "n c h w"]
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Logits and auxiliary logits (N, num_classes) of images of at least 299 × 299 pixels.

        The loss of 1512.00567 is that of the logits and 0.4 times that of the auxiliary ones.

        Raises:
            ValueError: the network was made without `aux=True`.
        """
        if self.AuxLogits is None:
            raise ValueError("there is no auxiliary classifier: make the network with aux=True")
        x = self.forward_stage(4, self.forward_stage(3, self.forward_stem(x)))
        return self.forward_head(self.forward_stage(5, x)), self.AuxLogits(x)


@register()
def inception_v3(*, aux: bool = False, dropout: float = 0.5, **common: Any) -> InceptionV3:
    """Inception-v3."""
    return InceptionV3(aux=aux, dropout=dropout, **common)
