"""Faster R-CNN with a feature pyramid on the networks of this package (table 7 of the paper)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from senet.data.image_data import IMAGENET_MEAN, IMAGENET_STD
from senet.errors import UserError
from senet.models import Network
from senet.models.features import FeatureMaps
from senet.networks.create import create_model
from senet.support.shapes import Float

_PYRAMID_CHANNELS = 256


class PyramidBackbone(nn.Module):
    """Feature maps and the feature pyramid above them (arXiv 1612.03144).

    Args:
        body: the feature maps.

    Attributes:
        out_channels: channels of every level, 256.
    """

    def __init__(self, body: FeatureMaps) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            list(body.channels), _PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool()
        )
        self.out_channels = _PYRAMID_CHANNELS

    def forward(self, x: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        """Levels `0` (finest) … and `pool` of images x (N,3,H,W)."""
        maps = self.body(x)
        levels = OrderedDict((str(index), level) for index, level in enumerate(maps.values()))
        return self.fpn(levels)


def faster_rcnn(
    network: str | Network,
    num_classes: int,
    *,
    pretrained: str | PathLike[str] | None = None,
    out_stages: Sequence[int] = (2, 3, 4, 5),
    frozen_bn: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **detector: Any,
) -> FasterRCNN:
    """torchvision's Faster R-CNN with a feature pyramid on a network.

    Args:
        network: name of a network, or a network, whose layers are then shared.
        num_classes: classes, the background (class 0) included.
        pretrained: weights of a named network, see `create_model`.
        out_stages: stages that the pyramid stands on.
        frozen_bn: whether batch norms of the network stay as they are; by default if `pretrained`
            is given, for batches of few images.
        options: options of a named network, see `create_model`.
        **detector: of torchvision's `FasterRCNN`: `min_size`, `max_size`, `box_score_thresh`, ….
            `image_mean` and `image_std` are by default those of the network's `preprocessing`, or
            ImageNet's.

    Returns:
        The detector: in training mode it takes images and targets and gives losses, in
        evaluation mode detections, as torchvision describes.

    Raises:
        UserError: unknown network or stage, `pretrained` or `options` beside a network, or
            weights that want BGR images.
    """
    model = resolve(network, pretrained, options)
    wanted = model.preprocessing or {}
    if wanted.get("channel_order", "rgb") != "rgb":
        raise UserError(
            f"the weights of {model.config['name']} want {wanted['channel_order']} images, "
            "torchvision's detectors give rgb"
        )
    scale = wanted.get("value_range", 1.0)
    mean, std = wanted.get("mean", IMAGENET_MEAN), wanted.get("std", IMAGENET_STD)
    detector.setdefault("image_mean", [value / scale for value in mean])
    detector.setdefault("image_std", [value / scale for value in std])
    frozen = pretrained is not None if frozen_bn is None else frozen_bn
    backbone = PyramidBackbone(FeatureMaps(model, out_stages, frozen_bn=frozen))
    return FasterRCNN(backbone, num_classes, **detector)


def resolve(
    network: str | Network,
    pretrained: str | PathLike[str] | None,
    options: Mapping[str, Any] | None,
) -> Network:
    """The network itself, or a new one of that name without classifier.

    Raises:
        UserError: unknown name, bad options or weights, or either beside a network.
    """
    if isinstance(network, str):
        return create_model(network, num_classes=0, pretrained=pretrained, **(options or {}))
    if pretrained is not None or options is not None:
        raise UserError("pretrained and options are for a network given by name")
    return network
