"""The network of a command: a checkpoint, or any network by name with weights from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.data import Preprocessing
from senet.errors import UserError
from senet.models import Network
from senet.networks.anywhere import open_source
from senet.weights import read_state_dict

# How ImageNet networks of torchvision are evaluated; timm's say their own.
_CROP = 224 / 256
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_network(
    model: str | None,
    weights: Path | None,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
) -> Checkpoint:
    """A checkpoint, or a network by name as if it came from one.

    Args:
        model: name for `open_source`; None: `weights` is a checkpoint.
        weights: checkpoint of this package, or a .safetensors or .pth file of the model's own
            state dict; None: fresh weights.
        num_classes: classes of the model; by default as many as the checkpoint knows, as
            `classes` names, or 1000.
        image_size: side of the images; by default that of the checkpoint or of the model.
        classes: names of the classes, where those of the data are meant.

    Raises:
        UserError: no network, an option that a checkpoint decides itself, weights that do not fit,
            or as for `open_source` and `open_checkpoint`.
    """
    if model is None:
        if weights is None:
            raise UserError("give a network by --model, or a checkpoint by --weights")
        checkpoint = open_checkpoint(weights)
        if num_classes not in (None, len(checkpoint.classes)) or image_size is not None:
            raise UserError(f"{weights} knows its own classes and image size: leave them out")
        return checkpoint
    count = num_classes or (len(classes) if classes else 1000)
    network = open_source(model, num_classes=count)
    if weights is not None:
        _load(network, weights)
    preprocessing = _preprocessing(network, image_size)
    names = tuple(classes) if classes and len(classes) == count else None
    network.classes = names  # type: ignore[assignment]
    return Checkpoint(
        cast(Network, network.eval()),
        names or tuple(map(str, range(count))),
        preprocessing,
        {},
        {},
        Path(model) if weights is None else weights,
    )


def _preprocessing(network: nn.Module, image_size: int | None) -> Preprocessing:
    """How a network's images are prepared: as timm says, else as for torchvision's networks."""
    size = cast(tuple[int, ...], network.input_size)
    channels, side = int(size[0]), int(image_size or size[-1])
    about: Any = getattr(network, "pretrained_cfg", None) or {}
    mean, std = about.get("mean", _MEAN), about.get("std", _STD)
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    bicubic = about.get("interpolation") == "bicubic"
    return Preprocessing(
        image_size=side,
        resize=round(side / about.get("crop_pct", _CROP)),
        mean=tuple(mean),
        std=tuple(std),
        channels=channels,
        interpolation="bicubic" if bicubic else "bilinear",
    )


def _load(network: nn.Module, weights: Path) -> None:
    state = read_state_dict(weights)
    own = network.state_dict()
    different = sorted(own.keys() ^ state.keys())
    different += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if different:
        raise UserError(
            f"weights {weights} do not fit the model: {different[0]} differs "
            f"({len(different)} in all); is it the same network with as many classes?"
        )
    network.load_state_dict(state)
