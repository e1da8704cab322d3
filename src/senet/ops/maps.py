"""Feature maps (N,C,*spatial): how they lie in memory and in which type sums over them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Not "meta". Asked here: torch.compile of PyTorch 2.11 leaves its graph where a call asks.
_WITH_AUTOCAST = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia"))
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums over elements of `dtype` are kept in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_is_on(device_type: str) -> bool:
    """Whether operations on that kind of device are under autocast."""
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Context without autocast; nothing at all (also in a graph) where autocast is not on."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def spread(t: Tensor, like: Tensor) -> Tensor:
    """Give t (N,C) or (C,) the trailing axes of `like` (N,C,*spatial), each of size 1."""
    return t.reshape(*t.shape, *(1,) * (like.ndim - 2))


def memory_format(x: Tensor) -> torch.memory_format:
    """The format whose order of axes x has: channels_last where channels are adjacent."""
    if x.ndim in (4, 5) and not x.is_contiguous() and x.stride(1) == 1:
        return torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return torch.contiguous_format


def common_format(maps: Sequence[Tensor]) -> torch.memory_format:
    """channels_last if one of the maps is, and not also contiguous."""
    formats = {memory_format(x) for x in maps} - {torch.contiguous_format}
    return formats.pop() if formats else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x itself when it is contiguous or channels_last, otherwise a copy that is."""
    return x.contiguous(memory_format=memory_format(x))


def stored(
    y: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.preserve_format
) -> Tensor:
    """The result y in the type and layout of its storage.

    Itself where it has them: torch.compile of PyTorch 2.11 gives no gradient to a result that it
    has under two names, and a conversion to what is there makes a second one.
    """
    if y.dtype is not dtype:
        y = y.to(dtype)
    if layout is torch.preserve_format or y.is_contiguous(memory_format=layout):
        return y
    return y.contiguous(memory_format=layout)
