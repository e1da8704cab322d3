"""Finding a network's weights among the names of a state dict that holds more than them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from senet.errors import UserError
from senet.models import Network
from senet.weights.files import State, without_shared_prefix, without_wrappers
from senet.weights.layouts import detect

# Tensors that others keep beside weights: thop's counters, AveragedModel's, and losses' own.
_BESIDE = re.compile(
    r"(^|\.)(total_ops|total_params|n_averaged)$"
    r"|^(criterion|criteria|loss|loss_fn|loss_func|loss_function)\."
)
# Which one it is where several networks in a file fit, the first of these that occurs in the names:
# an average of the weights, else the one that gradients trained (MoCo's query encoder, BYOL's
# online network, DINO's student).
_PREFERRED = (
    *("ema_model.", "model_ema.", "ema.", "encoder_q.", "base_encoder.", "online_network."),
    *("online_encoder.", "student.", "model.", "network.", "net.", "backbone.", "encoder."),
)
_DEPTH = 4  # names from the root down to a network


@dataclass(frozen=True)
class Selection:
    """The weights for one network.

    Attributes:
        state: tensors by the network's names, in whatever layout.
        prefix: what stood before those names.
        dropped: names of what is not the network's.
    """

    state: State
    prefix: str
    dropped: tuple[str, ...]


def select(state: State, model: nn.Module) -> Selection:
    """The part of a state dict that is for a model, whatever its names begin with.

    Args:
        state: tensors by name, as a file has them.
        model: the model; only its names count.

    Raises:
        UserError: several networks in it fit, and none is known to be the one.
    """
    own = model.state_dict().keys()
    state = without_wrappers(state, own)
    prefix = _prefix(state, model)
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    outside = [k for k in state if not k.startswith(prefix)]
    beside = [k for k in inside if k not in own and _BESIDE.search(k)]
    kept = {k: v for k, v in inside.items() if k not in beside}
    if not _fitting(kept, model):  # nothing of it is known: the usual error names what is missing
        kept = without_shared_prefix(kept)
    return Selection(kept, prefix, (*outside, *(f"{prefix}{k}" for k in beside)))


def _fitting(state: State, model: nn.Module) -> int:
    """How many of a model's names are in a state dict."""
    if state and isinstance(model, Network) and hasattr(model, "config"):
        state = detect(state).decode(state, model)
    return len(state.keys() & model.state_dict().keys())


def _prefix(state: State, model: nn.Module) -> str:
    enough = len(model.state_dict()) / 2
    if _fitting(state, model) >= enough:
        return ""
    groups: dict[str, State] = {}
    for key, tensor in state.items():
        parts = key.split(".")
        for depth in range(1, min(len(parts), _DEPTH + 1)):
            prefix = "".join(f"{part}." for part in parts[:depth])
            groups.setdefault(prefix, {})[key.removeprefix(prefix)] = tensor
    scores = {p: _fitting(group, model) for p, group in groups.items() if len(group) >= enough}
    best = max(scores.values(), default=0)
    if best < enough:
        return ""
    return _one_of([prefix for prefix, score in scores.items() if score == best], scores)


def _one_of(found: list[str], scores: Mapping[str, int]) -> str:
    if len(found) == 1:
        return found[0]
    for word in _PREFERRED:
        fitting = [p for p in found if f".{p}".endswith(f".{word}") or f".{word}" in f".{p}"]
        if len(fitting) == 1:
            return fitting[0]
    raise UserError(
        f"weights: {len(found)} networks in them fit ({', '.join(sorted(found))}): give the one "
        "you mean as a dict, {name.removeprefix(PREFIX): tensor …}"
    )
