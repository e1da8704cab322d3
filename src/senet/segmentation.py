"""DeepLabv3 (arXiv 1706.05587) on the residual networks of this package."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from senet.detection import resolve
from senet.models import Network
from senet.models.features import FeatureMaps, dilate
from senet.support.shapes import Float


class SegmentationBackbone(nn.Module):
    """Feature maps under the names that torchvision's segmentation models look for."""

    def __init__(self, body: FeatureMaps) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        """`out`, the last stage's map, and `aux`, that of the stage before if there is one."""
        maps = list(self.body(x).values())
        return dict(zip(("aux", "out") if len(maps) > 1 else ("out",), maps, strict=True))


def deeplabv3(
    network: str | Network,
    num_classes: int,
    *,
    pretrained: str | PathLike[str] | None = None,
    output_stride: int = 8,
    aux: bool = False,
    frozen_bn: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> DeepLabV3:
    """torchvision's DeepLabv3 on a residual network whose last stages are dilated.

    Args:
        network: name of a network, or a network, whose layers are then shared and dilated.
        num_classes: classes, the background included.
        pretrained: weights of a named network, see `create_model`.
        output_stride: stride of the last map, 8 or 16.
        aux: with a second head on the stage before the last, for training.
        frozen_bn: whether batch norms of the network stay as they are; by default if `pretrained`
            is given.
        options: options of a named network, see `create_model`.

    Returns:
        The model: images (N,3,H,W) → {"out": logits (N, num_classes, H, W)} and, with `aux`,
        "aux" likewise. Its heads have batch norms: training needs more than one image a batch.

    Raises:
        UserError: unknown network, not a residual one, or an `output_stride` it cannot have.
    """
    model = resolve(network, pretrained, options)
    dilate(model, output_stride)
    frozen = pretrained is not None if frozen_bn is None else frozen_bn
    stages = tuple(model.stages)[-2:] if aux else tuple(model.stages)[-1:]
    body = FeatureMaps(model, stages, frozen_bn=frozen)
    head = DeepLabHead(body.channels[-1], num_classes)
    auxiliary = FCNHead(body.channels[0], num_classes) if aux else None
    return DeepLabV3(SegmentationBackbone(body), head, auxiliary)
