"""VGG-16 with batch norm (arXiv 1409.1556), in torchvision's structure and with its names."""

from typing import Any

import torch
from torch import Tensor, nn

from senet.models.network import Network, Stage
from senet.models.options import SEOptions, check_dropout, stage_options
from senet.models.registry import register
from senet.models.resnet import initialise
from senet.nn.block import SqueezeExcitation, hooked
from senet.nn.tails import bn_relu
from senet.support.shapes import Float

_STAGES: dict[int, tuple[int, ...]] = {
    1: (64, 64),
    2: (128, 128),
    3: (256, 256, 256),
    4: (512, 512, 512),
    5: (512, 512, 512),
}


class ReLUSE(nn.Module):
    """ReLU, then SE: the last activation of a stage, so that `features` keeps its numbers."""

    def __init__(self, se: SqueezeExcitation) -> None:
        super().__init__()
        self.se = se

    def forward(
        self, x: Float[Tensor, "n c h w"], bn: nn.BatchNorm2d | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Same shape; with `bn`, the batch norm before the ReLU is taken in the same pass."""
        return self.se(torch.relu(x) if bn is None else bn_relu(x, bn))


class VGG(Network):
    """VGG-16 with batch norm: five stages of 3×3 convolutions, each followed by max pooling.

    SE stands at the end of each stage, behind the last ReLU and before the pooling: five blocks.
    The paper leaves the place open.

    Args:
        num_classes: classes; 0 for no classifier: the network then returns the last map's mean
            over its positions, without the two layers of 4096.
        in_channels: channels of the images.
        se: SE options, or None for the plain network.
        dropout: share of the 4096 features dropped in training, in both layers.

    Raises:
        ValueError: dropout outside [0, 1).
    """

    head = "classifier.6"

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        se: SEOptions | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        if se is not None:
            se.check_stages(tuple(_STAGES))
            se.check_integration("standard")
        self.input_size = (in_channels, 224, 224)
        self.min_input_size = 32
        layers: list[nn.Module] = []
        channels = in_channels
        self.stages = {}
        for stage, widths in _STAGES.items():
            start = len(layers)
            for width in widths:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            options = stage_options(se, stage)
            if options is not None:
                layers[-1] = ReLUSE(options.block(channels))
            layers.append(nn.MaxPool2d(2, 2))
            children = tuple(f"features.{index}" for index in range(start, len(layers)))
            self.stages[stage] = Stage(children, channels, 2**stage)
        self.features = nn.Sequential(*layers)
        self.num_features = channels
        self.dropout = dropout
        self.avgpool: nn.Module
        self.classifier: nn.Module
        self.make_classifier(num_classes)
        initialise(self)

    def make_classifier(self, num_classes: int) -> None:
        last = getattr(self, "classifier", None)
        if num_classes and isinstance(last, nn.Sequential):  # the two layers of 4096 stay
            last[-1] = nn.Linear(4096, num_classes)
            return
        self.avgpool = nn.AdaptiveAvgPool2d(7 if num_classes else 1)
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Sequential(
                nn.Linear(self.num_features * 49, 4096),
                nn.ReLU(),
                nn.Dropout(self.dropout),
                nn.Linear(4096, 4096),
                nn.ReLU(),
                nn.Dropout(self.dropout),
                nn.Linear(4096, num_classes),
            )

    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The images themselves."""
        return x

    def forward_stage(self, stage: int, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """The output of `stage`, behind its pooling, for the output x of the stage before."""
        return self.through(lambda y: self._layers(stage, y), x, self.features)

    def _layers(self, stage: int, x: Tensor) -> Tensor:
        indices = [int(name.removeprefix("features.")) for name in self.stages[stage].children]
        for index in indices[:-1:3]:
            conv, bn, relu = self.features[index : index + 3]
            # The same arithmetic with and without SE: insertion leaves every bit of the output.
            x = conv(x)
            if isinstance(relu, ReLUSE):
                x = relu(x, bn)
            elif type(relu) is nn.ReLU and not hooked(relu):
                x = bn_relu(x, bn)
            else:  # another one in its place, or one that is listened to
                x = relu(bn(x))
        return self.features[indices[-1]](x)

    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        x = torch.flatten(self.avgpool(x), 1)
        if pre_logits and isinstance(self.classifier, nn.Sequential):
            for layer in self.classifier[:-1]:
                x = layer(x)
            return x
        return self.classifier(x)


@register()
def vgg16_bn(*, dropout: float = 0.5, **common: Any) -> VGG:
    """VGG-16 with batch norm (table 2)."""
    return VGG(dropout=dropout, **common)
