"""What a file of weights says about its network, so that it can be built and used again."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from senet.errors import UserError
from senet.support.tensors import pack, unpack

FORMAT, VERSION = "senet", 1
WEIGHTS = "model.safetensors"


def describe(
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any] | None,
    classes: Iterable[str] | None,
    *,
    metrics: Mapping[str, float] | None = None,
    task: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The description of a network; JSON-able.

    Args:
        config: the network's `config`.
        preprocessing: how an image becomes its input, as plain values; None where unknown.
        classes: names in the order of the outputs; None or empty where nobody knows them.
        metrics: what it was measured at.
        task: what the outputs are, from a task's `to_dict`; None: logits of classes.
        run: options of the run that trained it, with the paths of its machine.
        **more: what else shall be told.
    """
    return {
        "version": VERSION,
        "model": config,
        "preprocessing": preprocessing,
        "classes": list(classes or ()),
        "metrics": dict(metrics or {}),
        "task": None if task is None else dict(task),
        "run": dict(run or {}),
        **more,
    }


def pack_described(weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> bytes:
    """The content of a `model.safetensors`: a state dict and what `describe` gave."""
    return pack(weights, FORMAT, description)


def read_described(path: Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the weights in a safetensors file that this package wrote.

    Raises:
        UserError: no safetensors file, one of others, or one of another version.
    """
    try:
        weights, held = unpack(path, FORMAT, device)
    except (SafetensorError, OSError) as error:
        remedy = "" if path.suffix == ".safetensors" else "; other weights need --model NAME"
        raise UserError(
            f"{path} is not a safetensors file, or is cut short: {error}{remedy}"
        ) from error
    if held is None:
        raise UserError(
            f"{path} was not written by senet (no {FORMAT!r} metadata), so it does not say which "
            "network it is for; give its name: --model NAME, or in Python "
            "senet.create_model(NAME, pretrained=PATH)"
        )
    try:
        description = json.loads(held)
        version = description["version"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: its {FORMAT!r} metadata are damaged: {error}") from error
    if version != VERSION:
        raise UserError(
            f"{path} has format version {version}, this senet reads {VERSION}; update senet"
        )
    return description, weights


def adopt(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Set the attributes of `senet.models.hub.HubMixin` that a description tells."""
    about = {
        "preprocessing": description["preprocessing"],
        "classes": tuple(description["classes"]) or None,
        "metrics": description["metrics"] or None,
        "task": description.get("task"),
    }
    for name, value in about.items():
        setattr(model, name, value)
