"""Weights in the layouts of others, for their loaders."""

import io
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save

from senet.errors import UserError
from senet.models import Network, SEOptions
from senet.models.description import pack_described
from senet.models.elsewhere import TIMM_NAMES
from senet.models.hub import description_of
from senet.nn.block import SqueezeExcitation
from senet.support.files import atomic_write
from senet.weights.files import State
from senet.weights.layouts import LAYOUTS

# Options that change what a network computes and that no other layout knows.
_OWN_OPTIONS = ("reduction", "squeeze", "gate", "integration", "stages")


def timm_name(model: Network) -> str:
    """The name under which timm builds this network.

    Raises:
        UserError: timm has no such network.
    """
    name = model.config["name"]
    variant = model.config["options"].get("variant", "torch")
    for theirs, ours in TIMM_NAMES.items():
        if (ours.name, ours.options.get("variant", "torch")) == (name, variant):
            return theirs
    raise UserError(f"timm has no network {name} with variant {variant!r}")


def convert(model: Network, layout: str) -> State:
    """The network's weights with the names and shapes of another layout.

    Args:
        model: a network of `create_model`.
        layout: one of `senet.weights.LAYOUTS`. "timm" takes timm's legacy names for the variants
            "caffe" and "cadene", whose structure only those have. Where timm rounds hidden widths
            up, they are padded with zeros, and missing biases become zeros: the function stays.

    Returns:
        Tensors by name on the CPU, not shared with the model.

    Raises:
        UserError: unknown layout, or one that cannot express this network.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    state = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    if layout == "senet":
        return state
    if changed := model.config.keys() & {"inserted", "folded"}:
        raise UserError(
            f"{layout} has no networks that were changed after they were made "
            f"({', '.join(sorted(changed))})"
        )
    for option in _OWN_OPTIONS:
        value = model.config["options"].get(option)
        default = getattr(SEOptions(), option)
        if value is not None and value != default:
            raise UserError(f"{layout} has no networks with {option}={value}")
    if layout in ("timm", "legacy"):
        legacy = timm_name(model).startswith("legacy_")
        if layout == "legacy" and not legacy:
            raise UserError(
                "the legacy layout is for SE networks of the variant caffe, not for "
                f"{timm_name(model)}"
            )
        layout = "legacy" if legacy else "timm"
        _fill_gates(model, state, divisor=8 if layout == "timm" else 1)
    encoded = LAYOUTS[layout].encode(state, model)
    return {key: tensor.contiguous() for key, tensor in encoded.items()}


def _fill_gates(model: Network, state: State, divisor: int) -> None:
    """Give SE blocks the biases and hidden width that the layout's loader builds."""
    options = SEOptions(divisor=divisor)
    for name, block in model.named_modules():
        if not isinstance(block, SqueezeExcitation):
            continue
        missing = options.hidden(block.channels) - block.hidden
        if missing < 0:
            raise UserError(
                f"{name} has hidden width {block.hidden}, and the layout's "
                f"{options.hidden(block.channels)}"
            )
        like = state[f"{name}.fc1.weight"]
        state.setdefault(f"{name}.fc1.bias", like.new_zeros(block.hidden))
        state.setdefault(f"{name}.fc2.bias", like.new_zeros(block.channels))
        for key, padding in (
            ("fc1.weight", (0, 0, 0, missing)),
            ("fc1.bias", (0, missing)),
            ("fc2.weight", (0, missing)),
        ):
            state[f"{name}.{key}"] = torch.nn.functional.pad(state[f"{name}.{key}"], padding)


def save_weights(model: Network, path: str | PathLike[str], layout: str = "senet") -> None:
    """Write the network's weights, whole or not at all.

    Args:
        model: a network of `create_model`.
        path: file to write; .safetensors, or .pth for PyTorch's own format.
        layout: see `convert`. With "senet" a .safetensors file keeps the network's configuration
            and preprocessing in its metadata.

    Raises:
        UserError: another suffix, or as in `convert`.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"path must end in .safetensors or .pth, got {path}")
    state = convert(model, layout)
    if path.suffix == ".safetensors":
        own = layout == "senet"
        atomic_write(path, pack_described(state, description_of(model)) if own else save(state))
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getvalue())
