"""State dicts from files: safetensors, or PyTorch files read without running their code."""

import json
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from senet.errors import UserError
from senet.models.description import FORMAT
from senet.support.hub import fetch
from senet.support.tensors import unpack

HUB_PREFIX = "hf_hub:"
# Where training scripts put the state dict in their checkpoints. A moving average of the weights
# comes first: it is what those who trained them measured.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema")
CONTAINERS = (
    *AVERAGES,
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights"),
    *("params", "teacher"),
)
# What Lightning and others put before each name.
_PREFIXES = ("model.", "state_dict.", "net.", "backbone.")
# What wrappers put into names, in front or in the middle: DataParallel, AveragedModel,
# torch.compile, FSDP.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Classes of plain values beside the weights. They are not loaded: something empty stands for each.
_VALUES = (
    *(
        "argparse.Namespace",
        "types.SimpleNamespace",
        "datetime.",
        "pathlib.",
        "numpy.",
        "uuid.UUID",
    ),
    *("omegaconf.", "yacs.config.", "easydict.", "torch.torch_version.TorchVersion"),
    *("lightning.fabric.utilities.data.", "pytorch_lightning.utilities.parsing."),
    *("lightning_fabric.utilities.data.", "mmengine.config.", "mmcv.utils.config."),
)
_DICTS = ("AttributeDict", "EasyDict", "ConfigDict", "CfgNode")

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


@dataclass(frozen=True)
class Contents:
    """What a file of weights held.

    Attributes:
        state: the tensors by name, as they are in the file.
        taken: path to them in a checkpoint of several parts (`state_dict_ema`); "" for none.
        left: names beside them that hold no tensors.
        description: the description that senet keeps in its own files, or {}.
    """

    state: State
    taken: str = ""
    left: tuple[str, ...] = ()
    description: dict[str, Any] = field(default_factory=dict)


def read_state_dict(source: str | PathLike[str]) -> State:
    """Tensors by name from a .safetensors, .pt or .pth file, or from `hf_hub:owner/name`.

    PyTorch files are read with `weights_only=True`: code in them is refused, not run. A hub
    repository must hold `model.safetensors`. Checkpoints of training scripts are unpacked (an
    average of the weights before the weights themselves), and what wrappers put into names, and a
    prefix that all names share (`model.`, `net.`, `backbone.`), are taken off.

    Raises:
        UserError: no such file, an unreadable one, or one that holds something else.
    """
    return without_shared_prefix(without_wrappers(read_contents(source).state))


def read_contents(source: str | PathLike[str]) -> Contents:
    """What a file of weights holds, its names as they are; errors as in `read_state_dict`."""
    path = local_file(source)
    description: dict[str, Any] = {}
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            loaded, held = unpack(path, FORMAT)
            description = json.loads(held or "{}")
        else:
            loaded = _unpickled(path)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"weights: {path} cannot be read: {_reason(error)}") from error
    try:
        return replace(contents_of(loaded), description=description)
    except UserError as error:
        raise UserError(f"{error} in {path}") from error


class _Empty:
    """Stands for a value beside the weights."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _unpickled(path: Path) -> Any:
    """What is in a file of torch.save; nothing in it is run.

    Raises:
        UserError: it holds objects of classes other than tensors and plain values.
    """
    known: dict[str, type] = {}
    while True:
        stand_ins: list[Any] = [(stand_in, name) for name, stand_in in known.items()]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                # Remarks on the pickle's protocol and storage types say nothing beside the error or
                # the weights.
                warnings.simplefilter("ignore", UserWarning)
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None or found[1] in known:
                raise
            name = found[1]
            if not name.startswith(_VALUES):
                raise UserError(
                    f"weights: {path} cannot be read: it holds more than tensors, perhaps a whole "
                    f"pickled model, and loading {name} would run code; where you trust it and "
                    "have its classes, write the weights alone: torch.save(model.state_dict(), …)"
                ) from error
            known[name] = OrderedDict if name.endswith(_DICTS) else type("Empty", (_Empty,), {})


def _reason(error: BaseException) -> str:
    """One line on why a file cannot be read, without what PyTorch advises or colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if isinstance(error, pickle.UnpicklingError):
        _, found, said = text.partition("WeightsUnpickler error: ")
        text = said if found else "it is damaged, or no file of torch.save"
    return next(iter(text.splitlines()), "").strip() or type(error).__name__


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


def contents_of(loaded: object) -> Contents:
    """The state dict within what a file or a checkpoint held.

    Raises:
        UserError: there is no state dict (tensors by name).
    """
    if isinstance(loaded, Mapping) and (found := _held(loaded, (), set())):
        return found
    raise UserError("weights: there is no state dict (tensors by name)")


def _held(loaded: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]) -> Contents | None:
    """The tensors of the first container that holds any, or those beside the containers.

    Args:
        loaded: a checkpoint, or a part of one.
        path: to that part.
        seen: ids of parts that were looked into: a pickle may hold itself.
    """
    seen.add(id(loaded))
    for name in CONTAINERS:
        part = loaded.get(name)
        if isinstance(part, Mapping) and id(part) not in seen:
            found = _held(part, (*path, name), seen)
            if found is not None:
                return found
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if not state:
        return None
    left = tuple(str(k) for k, v in loaded.items() if not isinstance(v, Tensor))
    return Contents(state, ".".join(path), left)


def without_wrappers(state: State, own: Collection[str] = ()) -> State:
    """Names without what wrappers put into them: `module.`, `_orig_mod.` and the like.

    Args:
        state: tensors by name.
        own: names of the model; wrappers' words that occur in them stay.
    """
    words = [w for w in _WRAPPERS if not any(w in name.split(".") for name in own)]
    renamed = {
        ".".join(part for part in key.split(".") if part not in words): tensor
        for key, tensor in state.items()
    }
    return renamed if len(renamed) == len(state) else dict(state)


def without_shared_prefix(state: State) -> State:
    """Names without the prefixes that all of them have and that training scripts put there."""
    prefix = _shared_prefix(state)
    while prefix is not None:
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        prefix = _shared_prefix(state)
    return state


def _shared_prefix(state: State) -> str | None:
    return next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
