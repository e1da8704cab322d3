"""ResNet, ResNeXt and SENet-154 for ImageNet, and the ResNets for CIFAR; plain and with SE.

Parameters are named as in torchvision (`layer1.0.conv1`, `bn1`, `downsample.0`) and timm
(`layer1.0.se.fc1`). Stage numbers are the paper's: `layer1` is stage 2.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from senet.models.network import Network, Stage
from senet.models.options import SEOptions, check_dropout, stage_options
from senet.models.registry import register
from senet.models.residual import (
    BasicBlock,
    BlockShape,
    Bottleneck,
    PreActivationBasicBlock,
    PreActivationBottleneck,
    conv,
)
from senet.nn.block import SqueezeExcitation
from senet.nn.convolution import convolve
from senet.nn.tails import bn_relu, bn_relu_into
from senet.support.shapes import Float

Variant = Literal["torch", "caffe", "cadene"]
Stem = Literal["7x7", "deep", "cifar"]
Block = (
    type[BasicBlock]
    | type[Bottleneck]
    | type[PreActivationBasicBlock]
    | type[PreActivationBottleneck]
)


class ResNet(Network):
    """Residual network: stem, stages of residual blocks, average pooling, classifier.

    Args:
        block: BasicBlock, Bottleneck or PreActivationBottleneck.
        depths: blocks in each stage; the number of planes doubles from stage to stage.
        num_classes: classes; 0 for no classifier.
        in_channels: channels of the images.
        se: SE options, or None for the plain network.
        variant: "torch" (stride in the 3×3, padded max pooling: what torchvision and timm users
            expect), "caffe" (the released networks: stride in a ResNet's first 1×1, max pooling
            in ceil mode without padding) or, with SE and basic blocks only,
            "cadene" (as caffe, with a further ReLU before SE: the structure that the weights of
            timm's `legacy_seresnet18` and `34` were trained in).
        stem: "7x7" (ImageNet), "deep" (three 3×3, SENet-154) or "cifar" (one 3×3, stride 1).
        planes: planes of the first stage.
        groups: groups of the 3×3 convolutions.
        width_per_group: channels of a group at 64 planes.
        reduce_first: by how much the first 1×1 is narrower than the 3×3.
        projection_kernel: kernel of projections with stride.
        stem_channels: channels of the CIFAR stem; `planes` by default.
        padded_shortcut: shortcuts without parameters (`PaddedShortcut`).
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
        stem_channels: int | None = None,
        padded_shortcut: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        if se is not None:
            se.check_stages(tuple(range(2, 2 + len(depths))))
        cifar = stem == "cifar"
        size = 32 if cifar else 224
        self.input_size = (in_channels, size, size)
        # One position is left of an image as large as the product of all strides.
        self.min_input_size = (1 if cifar else 4) * 2 ** (len(depths) - 1)

        channels = {"7x7": 64, "deep": 128, "cifar": stem_channels or planes}[stem]
        self.conv1: nn.Module
        if stem == "deep":
            # One Sequential, as in timm, whose seven entries are conv, BN, ReLU, …, conv.
            self.conv1 = nn.Sequential(
                conv(in_channels, 64, 3, 2),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                conv(64, 64, 3),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                conv(64, channels, 3),
            )
        else:
            self.conv1 = conv(in_channels, channels, *((3, 1) if cifar else (7, 2)))
        self.preactivation = block in (PreActivationBasicBlock, PreActivationBottleneck)
        if not self.preactivation:
            self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = None if cifar else nn.MaxPool2d(3, 2, padding=1)

        self.stages = {}
        for index, depth in enumerate(depths):
            stage_planes = planes * 2**index
            width = stage_planes * width_per_group // 64 * groups
            blocks = []
            for position in range(depth):
                shape = BlockShape(
                    in_channels=channels,
                    planes=stage_planes,
                    stride=2 if position == 0 and index > 0 else 1,
                    width=width,
                    first_width=width // reduce_first,
                    groups=groups,
                    projection_kernel=projection_kernel,
                    padded_shortcut=padded_shortcut,
                )
                blocks.append(block(shape, stage_options(se, index + 2)))
                channels = stage_planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            stride = (1 if cifar else 4) * 2**index
            self.stages[index + 2] = Stage((f"layer{index + 1}",), channels, stride)

        self.num_features = channels
        self.norm = nn.BatchNorm2d(channels) if self.preactivation else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)
        self.set_variant(variant)

    def set_variant(self, variant: Variant) -> None:
        """Move strides, pooling and activations to where `variant` has them; no parameter changes.

        Raises:
            ValueError: unknown variant, or "cadene" for a network without SE or basic blocks.
        """
        if variant not in get_args(Variant):
            raise ValueError(
                f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}"
            )
        blocks = [module for module in self.modules() if isinstance(module, BasicBlock)]
        if variant == "cadene" and not any(block.se_at("standard") for block in blocks):
            raise ValueError(
                'variant "cadene" is for basic blocks with SE (se_resnet18, se_resnet34); '
                'use "caffe"'
            )
        for block in blocks:
            block.relu_before_se = variant == "cadene"
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.place_stride(first=variant != "torch")
        if self.maxpool is not None:
            self.maxpool.padding = 1 if variant == "torch" else 0
            self.maxpool.ceil_mode = variant != "torch"

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What the first stage gets of images x (N, in_channels, H, W)."""
        x = convolve(self.conv1, x)
        if self.preactivation:
            return x if self.maxpool is None else self.maxpool(x)
        return (
            bn_relu(x, self.bn1)
            if self.maxpool is None
            else bn_relu_into(x, self.bn1, self.maxpool)
        )

    def forward_stage(self, stage: int, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        x = super().forward_stage(stage, x)
        if self.norm is not None and stage == max(self.stages):
            return bn_relu(x, self.norm)
        return x

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = self.dropout(torch.flatten(self.avgpool(x), 1))
        return x if pre_logits else self.fc(x)


def initialise(model: nn.Module) -> None:
    """He initialisation of all convolutions (section 5: fan-out, for ReLU); BN as the identity.

    The fan-out of a grouped convolution is that of one group, so that depthwise ones keep the
    size of their input. Biases start at zero. SE blocks keep their own initialisation
    (`SqueezeExcitation.reset_parameters`).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
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


@register()
def resnext26_32x4d(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNeXt-26 32×4d, of which timm has weights (`legacy_seresnext26_32x4d`)."""
    return ResNet(Bottleneck, (2, 2, 2, 2), groups=32, width_per_group=4, variant=variant, **common)


@register()
def resnext101_32x8d(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNeXt-101 32×8d, of which torchvision has weights."""
    return ResNet(
        Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8, variant=variant, **common
    )


@register()
def resnext101_64x4d(*, variant: Variant = "torch", **common: Any) -> ResNet:
    """ResNeXt-101 64×4d, of which torchvision has weights."""
    return ResNet(
        Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4, variant=variant, **common
    )


@register(se_name="senet154")
def senet154_plain(*, variant: Variant = "torch", dropout: float = 0.2, **common: Any) -> ResNet:
    """SENet-154 without its SE blocks: a modified ResNeXt-152 64×4d (the paper's appendix)."""
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
    block = common.pop("block", BasicBlock)
    depths = ((depth - 2) // 6,) * 3
    return ResNet(block, depths, stem="cifar", planes=16, padded_shortcut=True, **common)


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
def resnet110_cifar(*, preactivation: bool = False, **common: Any) -> ResNet:
    """ResNet-110 for 32×32 images (tables 4 and 5, whose baseline has pre-activation)."""
    return _cifar(110, block=PreActivationBasicBlock if preactivation else BasicBlock, **common)


@register()
def resnet164_cifar(**common: Any) -> ResNet:
    """Pre-activation ResNet-164 for 32×32 images: bottlenecks (tables 4 and 5)."""
    return ResNet(PreActivationBottleneck, (18, 18, 18), stem="cifar", planes=16, **common)


@register()
def wrn16_8_cifar(**common: Any) -> ResNet:
    """Wide ResNet 16-8 for 32×32 images (arXiv 1605.07146; tables 4 and 5)."""
    return ResNet(
        PreActivationBasicBlock, (2, 2, 2), stem="cifar", planes=128, stem_channels=16, **common
    )
