"""Networks of this package: a plain one becomes its registered twin with SE."""

from typing import Any

import torch
from torch import nn

from senet.anatomy.excitations import excitations
from senet.errors import UserError
from senet.insertion.report import Place
from senet.models import Network, build_model
from senet.models.registry import entry
from senet.nn.block import SqueezeExcitation


def _options(
    model: Network, reduction: float, gate: str, chosen: tuple[int, ...] | None
) -> dict[str, Any]:
    options = dict(model.config["options"])
    if reduction != 16:
        options["reduction"] = reduction
    options["gate"] = gate
    if chosen is not None:
        options["stages"] = list(chosen)
    return options


def _twin(model: Network, **options: Any) -> Network:
    config = model.config
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_model(
            entry(config["name"]).twin,
            num_classes=config["num_classes"],
            in_channels=config["in_channels"],
            **options,
        )


def twin_places(
    model: Network, reduction: float, gate: str, chosen: tuple[int, ...] | None
) -> list[Place]:
    """The places of the registered twin with SE."""
    present = excitations(model)
    if entry(model.config["name"]).se or present:
        named = next(iter(present), model.config["name"])
        raise UserError(
            f"the model already has SE there: {named}; insert into "
            f"{entry(model.config['name']).twin}, or name modules without it by where=[…]"
        )
    twin = _twin(model, **_options(model, reduction, gate, chosen))
    places = []
    for name, excitation in excitations(twin).items():
        se = excitation.module
        assert isinstance(se, SqueezeExcitation)
        holder, _, child = name.rpartition(".")
        slot = model.get_submodule(holder)
        if child != "se" or not (hasattr(slot, "se") or isinstance(slot, nn.ReLU)):
            raise UserError(
                f"{model.config['name']} has no slot for {name}; give where='conv' or names"
            )
        places.append(
            Place(
                module=holder,
                block=name,
                kind="twin",
                stage=_stage_of(model, holder),
                channels=se.channels,
                hidden=se.hidden,
                dims=se.dims,
            )
        )
    return places


def _stage_of(model: Network, name: str) -> int | None:
    """The stage that a module belongs to."""
    for stage, content in model.stages.items():
        if any(f"{name}.".startswith(f"{child}.") for child in content.children):
            return stage
    return None


def become_twin(
    model: nn.Module, reduction: float, gate: str, chosen: tuple[int, ...] | None
) -> None:
    """The configuration of the twin, so that a checkpoint of the model rebuilds it."""
    assert isinstance(model, Network)
    config = model.config
    options = _options(model, reduction, gate, chosen)
    # The twin holds the blocks already: nothing is to be inserted when it is rebuilt.
    rest = {key: value for key, value in config.items() if key != "inserted"}
    model.config = {**rest, "name": entry(config["name"]).twin, "options": options}
