"""Gates trained on a frozen network, kept in a small file that loads onto the original network."""

import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from senet.anatomy import excitations
from senet.errors import UserError
from senet.insertion.insert import attach, inserted_places
from senet.insertion.report import Place
from senet.models import Network
from senet.networks.anywhere import head_of, new_head
from senet.nn.block import SqueezeExcitation
from senet.support.files import atomic_write
from senet.support.tensors import pack, unpack

FORMAT, VERSION = "senet-adapter", 1


def has_adapter(model: nn.Module) -> bool:
    """Whether `save_adapter` finds blocks: not those that a foreign network had from the start."""
    return bool(inserted_places(model) or _own_places(model))


def save_adapter(model: nn.Module, path: str | PathLike[str], *, head: bool = False) -> int:
    """Write the SE blocks of a model that `senet.insert` changed, as one safetensors file.

    Args:
        model: with inserted blocks, or a network of this package with SE.
        path: file to write, as a whole or not at all.
        head: also the classifier.

    Returns:
        Size of the file in bytes.

    Raises:
        UserError: the model has no such blocks.
    """
    places = inserted_places(model) or _own_places(model)
    if not places:
        raise UserError("the model has no inserted SE blocks to keep in an adapter")
    names = [place.block for place in places]
    about: dict[str, Any] = {"version": VERSION, "gate": _gate(model, names)}
    about["places"] = [vars(place) for place in places]
    about["base"] = _outline(model, names, head_of(model)[0] if head else None)
    if head:
        name, layer = head_of(model)
        about["head"], about["num_classes"] = name, layer.out_features
        names.append(name)
    tensors = {
        f"{name}.{key}": value
        for name in names
        for key, value in model.get_submodule(name).state_dict().items()
    }
    content = pack(tensors, FORMAT, about)
    atomic_write(path, content)
    return len(content)


def _outline(model: nn.Module, without: Sequence[str], head: str | None) -> str:
    """A digest of the names and shapes of a network's tensors, but those of some modules."""
    left_out = (*without, *([head] if head else []))
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if not key.startswith(tuple(f"{name}." for name in left_out)):
            digest.update(f"{key} {tuple(value.shape)}".encode())
    return digest.hexdigest()[:16]


def _own_places(model: nn.Module) -> tuple[Place, ...]:
    """The places of a registered network with SE, as `insert` finds them in its plain twin."""
    if not isinstance(model, Network):
        return ()
    return tuple(
        Place(
            module=name.rpartition(".")[0],
            block=name,
            kind="twin",
            stage=None,
            channels=block.module.channels,
            hidden=block.module.hidden,
            dims=block.module.dims,
        )
        for name, block in excitations(model).items()
        if isinstance(block.module, SqueezeExcitation)
    )


def _gate(model: nn.Module, names: list[str]) -> str:
    return str(model.get_submodule(names[0]).gate_name)


def load_adapter(model: nn.Module, path: str | PathLike[str]) -> None:
    """Put the SE blocks of an adapter, with their weights, into the original network.

    Args:
        model: the network that the blocks were inserted into, without them; changed in place.
        path: file of `save_adapter`.

    Raises:
        UserError: it is no adapter, or one of another network; the model is unchanged then.
    """
    if not Path(path).is_file():
        raise UserError(f"adapter: no such file: {path}")
    try:
        tensors, held = unpack(path, FORMAT)
    except SafetensorError as error:
        raise UserError(f"{path} is no adapter of senet") from error
    if held is None:
        raise UserError(f"{path} is no adapter of senet")
    about = json.loads(held)
    present = excitations(model)
    if present:
        raise UserError(f"the model has SE already: {next(iter(present))}; take the original one")
    if _outline(model, (), about.get("head")) != about["base"]:
        raise UserError(
            f"{path} is of another network: names or shapes of this one's parameters differ from "
            "those it was trained on"
        )
    attach(model, [Place(**place) for place in about["places"]], gate=about["gate"])
    if "head" in about and head_of(model)[1].out_features != about["num_classes"]:
        new_head(model, about["num_classes"])
    own = model.state_dict()
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)
