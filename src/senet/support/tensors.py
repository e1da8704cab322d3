"""Tensors and what they are, together in one safetensors file."""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


def pack(tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> bytes:
    """The content of a safetensors file.

    Args:
        tensors: by name, on any device.
        kind: key of the metadata; names the kind of file.
        about: what the tensors are, JSON-able.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One metadata key only: safetensors writes several in an arbitrary order.
    return save(plain, {kind: json.dumps(about, sort_keys=True)})


def unpack(
    path: str | PathLike[str], kind: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a safetensors file, and what `pack` was told, as JSON; None in other files.

    Raises:
        SafetensorError: it is no such file, or cut short.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt", device=device) as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        return tensors, (file.metadata() or {}).get(kind)
