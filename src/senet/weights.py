"""Weights from files: safetensors, or PyTorch files read without running their code."""

import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from senet.errors import UserError

HUB_PREFIX = "hf_hub:"


def read_state_dict(source: str | PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors, .pt or .pth file, or from `hf_hub:owner/name`.

    PyTorch files are read with `weights_only=True`: code in them is refused, not run. A hub
    repository must hold `model.safetensors`.

    Raises:
        UserError: no such file, an unreadable one, or one that holds something else.
    """
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        from huggingface_hub import hf_hub_download

        source = hf_hub_download(source.removeprefix(HUB_PREFIX), "model.safetensors")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"weights: {path} cannot be read: {reason}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"weights: {path} holds no state dict (tensors by name)")
    return dict(loaded)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor] | str | PathLike[str]) -> None:
    """Load weights into a model; every key and shape must match.

    Args:
        model: the model, changed in place.
        weights: state dict, or a source as in `read_state_dict`.

    Raises:
        UserError: keys or shapes differ (the message names the first ones); the model is
            unchanged then.
    """
    state = weights if isinstance(weights, Mapping) else read_state_dict(weights)
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"weights do not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)
