"""The network of a command: a checkpoint, or any network by name with weights from a file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from senet.checkpoint.files import (
    Checkpoint,
    foreign_with_weights,
    open_checkpoint,
    open_weights,
)
from senet.data import Preprocessing
from senet.errors import UserError
from senet.models import Network
from senet.models.elsewhere import split_tag
from senet.networks.anywhere import TORCHVISION, open_source
from senet.networks.preparation import imagenet, of_torchvision
from senet.weights import read_state_dict
from senet.weights.released import is_pretrained


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
        weights: checkpoint of this package, a .safetensors or .pth file of the model's own state
            dict, or `pretrained`, as in `model_for_weights`; None: fresh weights.
        num_classes: classes of the model; by default as many as the checkpoint knows, as
            `classes` names, as `weights` have, or as `open_source` gives it.
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
    if num_classes is not None and num_classes < 1:
        raise UserError(f"num_classes must be at least 1, got {num_classes}")
    count = num_classes or (len(classes) if classes else None)
    if weights is not None and (is_pretrained(weights) or split_tag(model).tag is not None):
        opened = open_weights(model, weights)
        if count not in (None, len(opened.classes)):
            raise UserError(
                f"the released weights of {model} are for {len(opened.classes)} classes, not "
                f"{count}: train them on the data first (senet train --init pretrained)"
            )
        if image_size is None:
            return opened
        preprocessing = opened.preprocessing.resized(image_size)
        opened.model.preprocessing = preprocessing.to_dict()
        return replace(opened, preprocessing=preprocessing)
    if weights is not None:
        network = foreign_with_weights(model, read_state_dict(weights), weights, count)
    else:
        network = open_source(model, num_classes=count)
    preprocessing = _preparation(model, network, weights)
    if image_size is not None:
        preprocessing = preprocessing.resized(image_size)
    network.preprocessing = preprocessing.to_dict()  # type: ignore[assignment]
    outputs: int = network.config["num_classes"]  # type: ignore[index,assignment]
    names = tuple(classes) if classes and len(classes) == outputs else None
    network.classes = names  # type: ignore[assignment]
    return Checkpoint(
        cast(Network, network.eval()),
        names or tuple(map(str, range(outputs))),
        preprocessing,
        {},
        {},
        Path(model) if weights is None else weights,
    )


def _preparation(name: str, network: nn.Module, weights: Path | None) -> Preprocessing:
    """How the network wants its images, as far as anyone says it."""
    if name.startswith(TORCHVISION):  # whose weights are said by the file's name
        return of_torchvision(name.removeprefix(TORCHVISION), weights)
    said: Any = network.preprocessing
    if said is not None:
        return Preprocessing.from_dict(said)
    size: Any = network.input_size
    return imagenet().resized(int(size[1]))
