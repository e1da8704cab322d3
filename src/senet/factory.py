"""Networks by name, with weights."""

from os import PathLike
from typing import Any

from senet.models import Network, build_model
from senet.weights import load_weights


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    pretrained: str | PathLike[str] | None = None,
    **options: Any,
) -> Network:
    """A network of the paper by name.

    Args:
        name: one of `list_models()`: `resnet50`, `se_resnet50`, `senet154`, ….
        num_classes: classes of the head; 0 for none (the network returns pooled features).
        in_channels: channels of the images.
        pretrained: weights to load: a .safetensors or .pth file of the same network, or
            `hf_hub:owner/name`. None: freshly initialised, a function of PyTorch's global seed.
        **options: of SE networks `reduction` (16), `squeeze` ("avg"), `gate` ("sigmoid"),
            `integration` ("standard"), `stages` (all), see `SEOptions`; of ImageNet networks
            `variant` ("torch" or "caffe"); of senet154 `dropout` (0.2).

    Returns:
        The network, in training mode, float32, on PyTorch's default device.

    Raises:
        UserError: unknown name (the closest is named), an option the network does not have, a
            value out of range, or weights that do not fit.
    """
    model = build_model(name, num_classes=num_classes, in_channels=in_channels, **options)
    if pretrained is not None:
        load_weights(model, pretrained)
    return model
