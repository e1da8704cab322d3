"""Networks by name, with weights."""

import logging
from os import PathLike
from typing import Any

from senet.errors import UserError
from senet.models import Network, build_model
from senet.weights import load_weights


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    pretrained: str | PathLike[str] | bool | None = None,
    **options: Any,
) -> Network:
    """A network of the paper by name.

    Args:
        name: one of `list_models()`: `resnet50`, `se_resnet50`, `senet154`, ….
        num_classes: classes of the head; 0 for none (the network returns pooled features).
        in_channels: channels of the images.
        pretrained: weights to load: a .safetensors or .pth file in any released layout (see
            `load_weights`, which also adapts the network to them), or `hf_hub:owner/name`. A
            last layer for another number of classes than a `num_classes` other than 1000 is left
            out, and the network's own one kept, for fine-tuning. What was done goes to the
            logger "senet". None and False: freshly initialised, a function of PyTorch's global
            seed. True is refused: no weights come with this package.
        **options: of SE networks `reduction` (16), `squeeze` ("avg"), `gate` ("sigmoid"),
            `integration` ("standard"), `stages` (all), `bias` (True), `divisor` (1), see
            `SEOptions`; of ImageNet ResNets `variant` ("torch", "caffe" or "cadene"); of some
            networks `dropout`; of inception_v3 `aux` (False), of mobilenet `width` (1.0), of
            resnet110_cifar `preactivation` (False).

    Returns:
        The network, in training mode, float32, on PyTorch's default device.

    Raises:
        UserError: unknown name (the closest is named), an option the network does not have, a
            value out of range, `pretrained` of another kind, or weights that do not fit.
    """
    if pretrained is True:
        raise UserError(
            f"pretrained=True: senet comes with no weights for {name}; give a file of any released "
            'layout (pretrained="model.safetensors") or a repository on the Hugging Face Hub '
            '(pretrained="hf_hub:owner/name")'
        )
    if not (pretrained is None or pretrained is False or isinstance(pretrained, str | PathLike)):
        raise UserError(
            f"pretrained must be a file, hf_hub:owner/name or None, got {pretrained!r}; tensors in "
            "memory go through senet.load_weights(model, tensors)"
        )
    model = build_model(name, num_classes=num_classes, in_channels=in_channels, **options)
    if pretrained:
        report = load_weights(model, pretrained, new_head=num_classes != 1000)
        logging.getLogger("senet").info("%s: %s: %s", name, pretrained, report)
    return model
