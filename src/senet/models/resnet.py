"""ResNet, ResNeXt and SENet-154 for ImageNet, and the ResNets for CIFAR; plain and with SE.

Parameters are named as in torchvision (`layer1.0.conv1`, `bn1`, `downsample.0`) and timm
(`layer1.0.se.fc1`). Stage numbers are the paper's: `layer1` is stage 2.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from senet.layers import SqueezeExcitation, bn_relu
from senet.models.network import Network, SEOptions
from senet.models.registry import register
from senet.models.residual import (
    BasicBlock,
    BlockShape,
    Bottleneck,
    PreActivationBottleneck,
    conv,
)

Variant = Literal["torch", "caffe"]
Stem = Literal["7x7", "deep", "cifar"]
Block = type[BasicBlock] | type[Bottleneck] | type[PreActivationBottleneck]


class ResNet(Network):
    """Residual network: stem, stages of residual blocks, average pooling, classifier.

    Args:
        block: BasicBlock, Bottleneck or PreActivationBottleneck.
        depths: blocks in each stage; the number of planes doubles from stage to stage.
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network.
        variant: "torch" (stride in the 3×3, padded max pooling: what torchvision and timm users
            expect) or "caffe" (the released networks: stride in a ResNet's first 1×1, max pooling
            in ceil mode without padding; paper.md section 7).
        stem: "7x7" (ImageNet), "deep" (three 3×3, SENet-154) or "cifar" (one 3×3, stride 1).
        planes: planes of the first stage.
        groups: groups of the 3×3 convolutions.
        width_per_group: channels of a group at 64 planes.
        reduce_first: by how much the first 1×1 is narrower than the 3×3.
        projection_kernel: kernel of projections with stride.
        dropout: share of the pooled features dropped in training.

    Raises:
        ValueError: unknown variant, a stage the network does not have, dropout outside [0, 1).
    """

    def __init__(
        self,
        block: Block,
        depths: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        se: SEOptions | None = None,
        variant: Variant = "torch",
        stem: Stem = "7x7",
        planes: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        reduce_first: int = 1,
        projection_kernel: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise ValueError(
                f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if se is not None:
            se.check_stages(tuple(range(2, 2 + len(depths))))
        cifar = stem == "cifar"
        size = 32 if cifar else 224
        self.input_size = (in_channels, size, size)
        # One position is left of an image as large as the product of all strides.
        self.min_input_size = (1 if cifar else 4) * 2 ** (len(depths) - 1)

        channels = {"7x7": 64, "deep": 128, "cifar": planes}[stem]
        self.conv1: nn.Module
        if stem == "deep":
            # One Sequential, as in timm, whose seven entries are conv, BN, ReLU, …, conv.
            self.conv1 = nn.Sequential(
                conv(in_channels, 64, 3, 2),
                nn.BatchNorm2d(64),
                nn.ReLU(inplace=True),
                conv(64, 64, 3),
                nn.BatchNorm2d(64),
                nn.ReLU(inplace=True),
                conv(64, channels, 3),
            )
        else:
            self.conv1 = conv(in_channels, channels, *((3, 1) if cifar else (7, 2)))
        self.preactivation = block is PreActivationBottleneck
        if not self.preactivation:
            self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = None if cifar else max_pool(variant)

        self.stage_names = tuple(f"layer{index + 1}" for index in range(len(depths)))
        for index, (name, depth) in enumerate(zip(self.stage_names, depths, strict=True)):
            stage_planes = planes * 2**index
            width = stage_planes * width_per_group // 64 * groups
            stage_se = se if se is not None and se.in_stage(index + 2) else None
            blocks = []
            for position in range(depth):
                shape = BlockShape(
                    in_channels=channels,
                    planes=stage_planes,
                    stride=2 if position == 0 and index > 0 else 1,
                    width=width,
                    first_width=width // reduce_first,
                    groups=groups,
                    stride_first=variant == "caffe" and groups == 1,
                    projection_kernel=projection_kernel,
                    padded_shortcut=cifar and block is BasicBlock,
                )
                blocks.append(block(shape, stage_se))
                channels = stage_planes * block.expansion
            self.add_module(name, nn.Sequential(*blocks))

        self.num_features = channels
        self.norm = nn.BatchNorm2d(channels) if self.preactivation else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """The last feature map (N, num_features, h, w) of images x (N, in_channels, H, W)."""
        x = self.conv1(x)
        if not self.preactivation:
            x = bn_relu(x, self.bn1)
        if self.maxpool is not None:
            x = self.maxpool(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return x if self.norm is None else bn_relu(x, self.norm)

    def forward_head(self, x: Float[Tensor, "n f a b"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of a last feature map; (N, num_features) for num_classes=0."""
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


def max_pool(variant: Variant) -> nn.MaxPool2d:
    """The pooling behind the ImageNet stem: 3×3, stride 2."""
    caffe = variant == "caffe"
    return nn.MaxPool2d(3, 2, padding=0 if caffe else 1, ceil_mode=caffe)


def initialise(model: nn.Module) -> None:
    """He initialisation of all convolutions (section 5: fan-out, for ReLU); BN as the identity.

    SE blocks keep their own initialisation (`SqueezeExcitation.reset_parameters`).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | SqueezeExcitation):
            module.reset_parameters()


@register()
def resnet18(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNet-18."""
    return ResNet(BasicBlock, (2, 2, 2, 2), variant=variant, **common)


@register()
def resnet34(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNet-34."""
    return ResNet(BasicBlock, (3, 4, 6, 3), variant=variant, **common)


@register()
def resnet50(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNet-50 (table 1)."""
    return ResNet(Bottleneck, (3, 4, 6, 3), variant=variant, **common)


@register()
def resnet101(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNet-101 (table 2)."""
    return ResNet(Bottleneck, (3, 4, 23, 3), variant=variant, **common)


@register()
def resnet152(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNet-152 (table 2)."""
    return ResNet(Bottleneck, (3, 8, 36, 3), variant=variant, **common)


@register()
def resnext50_32x4d(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNeXt-50 32×4d (table 1)."""
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, variant=variant, **common)


@register()
def resnext101_32x4d(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNeXt-101 32×4d (table 2)."""
    return ResNet(
        Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=4, variant=variant, **common
    )


@register(se_name="senet154")
def senet154_plain(*, variant: Variant = "torch", dropout: float = 0.2, **common: Any) -> ResNet:
    """SENet-154 without its SE blocks: a modified ResNeXt-152 64×4d (paper.md section 7)."""
    return ResNet(
        Bottleneck,
        (3, 8, 36, 3),
        stem="deep",
        groups=64,
        width_per_group=4,
        reduce_first=2,
        projection_kernel=3,
        variant=variant,
        dropout=dropout,
        **common,
    )


def _cifar(depth: int, **common: Any) -> ResNet:
    """CIFAR ResNet of 6n + 2 layers in three stages of 16, 32, 64 channels (1512.03385, 4.2)."""
    return ResNet(BasicBlock, ((depth - 2) // 6,) * 3, stem="cifar", planes=16, **common)


@register()
def resnet8_cifar(**common: Any) -> ResNet:
    """ResNet-8 for 32×32 images: the network of the demo."""
    return _cifar(8, **common)


@register()
def resnet20_cifar(**common: Any) -> ResNet:
    """ResNet-20 for 32×32 images."""
    return _cifar(20, **common)


@register()
def resnet32_cifar(**common: Any) -> ResNet:
    """ResNet-32 for 32×32 images."""
    return _cifar(32, **common)


@register()
def resnet44_cifar(**common: Any) -> ResNet:
    """ResNet-44 for 32×32 images."""
    return _cifar(44, **common)


@register()
def resnet56_cifar(**common: Any) -> ResNet:
    """ResNet-56 for 32×32 images."""
    return _cifar(56, **common)


@register()
def resnet110_cifar(**common: Any) -> ResNet:
    """ResNet-110 for 32×32 images (tables 4 and 5)."""
    return _cifar(110, **common)


@register()
def resnet164_cifar(**common: Any) -> ResNet:
    """Pre-activation ResNet-164 for 32×32 images: bottlenecks (tables 4 and 5)."""
    return ResNet(PreActivationBottleneck, (18, 18, 18), stem="cifar", planes=16, **common)
