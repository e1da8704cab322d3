"""What `senet insert` does: a checkpoint with SE inserted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from senet.checkpoint.files import open_checkpoint
from senet.checkpoint.write import check_new, write_checkpoint
from senet.data import Preprocessing
from senet.errors import UserError
from senet.insertion.insert import insert
from senet.insertion.report import InsertionReport
from senet.models.description import describe
from senet.networks.anywhere import TORCHVISION, open_source
from senet.networks.preparation import imagenet, of_torchvision
from senet.weights import read_state_dict


@dataclass(frozen=True)
class Inserted:
    """What `insert_checkpoint` wrote.

    Attributes:
        folder: checkpoint folder.
        report: what went where.
    """

    folder: Path
    report: InsertionReport


def insert_checkpoint(
    out: Path,
    *,
    model: str | None = None,
    weights: Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    options: Mapping[str, Any],
) -> Inserted:
    """Insert SE into a network and write it as a checkpoint that every command takes.

    Args:
        out: folder to make; it must not exist.
        model: name for `open_source`; by default that of the checkpoint `weights`.
        weights: checkpoint of this package, or a .safetensors or .pth file of the model's own
            state dict; None: fresh weights.
        num_classes: classes of the model; by default as many as the checkpoint knows, or 1000.
        image_size: side of the images; by default that of the checkpoint or of the model.
        options: of `senet.insert`: where, reduction, stages.

    Raises:
        UserError: a folder that exists, or as for `open_source`, `open_checkpoint` and `insert`;
            nothing is written.
    """
    check_new(out)
    classes: Sequence[str]
    run: dict[str, Any] = {}
    if model is None:
        if weights is None:
            raise UserError("give a network by --model, or a checkpoint by --weights")
        checkpoint = open_checkpoint(weights)
        network: nn.Module = checkpoint.model
        classes, preprocessing = checkpoint.model.classes or (), checkpoint.preprocessing
        run = checkpoint.config
        if num_classes not in (None, len(checkpoint.classes)) or image_size is not None:
            raise UserError(f"{weights} knows its own classes and image size: leave them out")
    else:
        network = open_source(model, num_classes=num_classes or 1000)
        preprocessing = _preparation(model, network, weights)
        if image_size is not None:
            preprocessing = preprocessing.resized(image_size)
        if weights is not None:
            _load(network, weights)
        classes = ()  # nobody knows their names
    side = preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, preprocessing.channels, side, side, generator=generator)
    report = insert(network.eval(), example_input=example, **options)
    config: Any = network.config
    description = describe(config, preprocessing.to_dict(), classes, run=run)
    write_checkpoint(out, network.state_dict(), description)
    return Inserted(out, report)


def _preparation(name: str, network: nn.Module, weights: Path | None) -> Preprocessing:
    """How the network wants its images, as far as anyone says it."""
    if name.startswith(TORCHVISION):  # whose weights are said by the file's name
        return of_torchvision(name.removeprefix(TORCHVISION), weights)
    said: Any = network.preprocessing
    if said is not None:
        return Preprocessing.from_dict(said)
    size: Any = network.input_size
    return imagenet().resized(int(size[1]))


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
