"""State dicts from files: safetensors, or PyTorch files read without running their code."""

import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from senet.errors import UserError
from senet.support.hub import fetch

HUB_PREFIX = "hf_hub:"
# Where training scripts put the state dict in their checkpoints, and what wrappers put before
# each name (DataParallel, Lightning, torch.compile).
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "weights")
_WRAPPERS = ("module.", "model.", "_orig_mod.", "state_dict.", "net.", "backbone.")

State = dict[str, Tensor]
UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,  # RecursionError is one
    EOFError,
    ValueError,  # of JSON and of text encodings too
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    OSError,  # of a seek to where a damaged archive points
)
"""What the readers of weights raise on damaged files, found by fuzzing them."""


def read_state_dict(source: str | PathLike[str]) -> State:
    """Tensors by name from a .safetensors, .pt or .pth file, or from `hf_hub:owner/name`.

    PyTorch files are read with `weights_only=True`: code in them is refused, not run. A hub
    repository must hold `model.safetensors`. Checkpoints of training scripts are unpacked (see
    `unwrap`).

    Raises:
        UserError: no such file, an unreadable one, or one that holds something else.
    """
    return read_with_description(source)[0]


def read_with_description(source: str | PathLike[str]) -> tuple[State, dict[str, Any]]:
    """As `read_state_dict`, and the description that senet keeps in its own files, or {}."""
    path = local_file(source)
    description: dict[str, Any] = {}
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {}).get("senet", "{}"))
                names = file.keys()
                loaded = {name: file.get_tensor(name) for name in names}
        else:
            with warnings.catch_warnings():
                # Remarks on the pickle's protocol and storage types say nothing beside the error or
                # the weights.
                warnings.simplefilter("ignore", UserWarning)
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"weights: {path} cannot be read: {reason}") from error
    try:
        return unwrap(loaded), description
    except UserError as error:
        raise UserError(f"{error} in {path}") from error


def local_file(source: str | PathLike[str]) -> Path:
    """The file itself, fetched first if it is `hf_hub:owner/name`.

    Raises:
        UserError: no such file, or it cannot be fetched.
    """
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return fetch(source.removeprefix(HUB_PREFIX), "model.safetensors")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"weights: no such file: {path}")
    return path


def unwrap(loaded: object) -> State:
    """The state dict within what a file held.

    Unpacks checkpoints ({"state_dict": …, "epoch": …}) and takes off a prefix that all names share
    (`module.`, `model.`, `_orig_mod.`, …).

    Raises:
        UserError: there is no state dict (tensors by name).
    """
    while isinstance(loaded, Mapping):
        inner = next((loaded[k] for k in _CONTAINERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if (
        not isinstance(loaded, Mapping)
        or not loaded
        or not all(isinstance(value, Tensor) for value in loaded.values())
    ):
        raise UserError("weights: there is no state dict (tensors by name)")
    state = dict(loaded)
    prefix = _shared_prefix(state)
    while prefix is not None:
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        prefix = _shared_prefix(state)
    return state


def _shared_prefix(state: State) -> str | None:
    return next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None)
