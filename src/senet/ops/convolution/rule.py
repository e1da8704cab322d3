"""Which pass of a convolution runs in which kernel: a fixed rule over shapes and instruction sets.

Nothing is timed at run time. A resumed run, another process and another day take the same kernels,
and so give the same digits; a choice by stopwatch would not.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from senet import kernels
from senet.errors import UserError
from senet.ops.convolution.description import output_size

_NAMES = ("auto", "torch", "senet")

# Fewer tiles of 4x4 outputs do not pay for the transforms of the weights.
_LEAST_TILES, _TILE = 32, 4
# What the kernels take, see `kernels/convolution/arguments.h`.
_GROUP, _MOST_PADDING = 16, 2
# Up to here they work in less than 64 MB.
_MOST_CHANNELS = 2048


class Passes(NamedTuple):
    """Of each pass whether the kernels compute it; PyTorch computes the others.

    Attributes:
        forward: output.
        x: gradient of the input.
        weight: gradient of the weights.
    """

    forward: bool = False
    x: bool = False
    weight: bool = False


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise UserError(f"{source} is {name!r}; choose one of {', '.join(_NAMES)}")
    if name == "senet" and kernels.MISSING:
        raise UserError(f"{source} is 'senet', which is not available: {kernels.MISSING}")
    return name


_choice = _checked(
    os.environ.get("SENET_CONVOLUTION") or "auto", "the environment's SENET_CONVOLUTION"
)


def chosen() -> str:
    """The name in force: of the environment's SENET_CONVOLUTION, or given to `use` last."""
    return _choice


def use(name: str) -> AbstractContextManager[None]:
    """Choose who computes convolutions, at once; as a context manager, until its end.

    Args:
        name: "auto" (the default: senet's kernels for the passes and shapes in which they were
            measured to be faster), "torch" (never) or "senet" (wherever they can).

    Raises:
        UserError: another name, or "senet" without the C++ kernels.
    """
    global _choice
    previous = _choice
    _choice = _checked(name, "the choice of convolutions")
    return _restoring(previous)


@contextmanager
def _restoring(previous: str) -> Iterator[None]:
    global _choice
    try:
        yield
    finally:
        _choice = previous


def passes(
    x: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> Passes:
    """What the kernels compute of float32 maps (N,C,H,W), channels_last, and weights (K,C,h,w)."""
    return _passes(x, weight, stride, padding, _choice, kernels.instruction_set())


@functools.lru_cache(4096)
def _passes(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    choice: str,
    isa: str,
) -> Passes:
    if choice == "torch" or not isa or not _able(x, weight, stride, padding):
        return Passes()
    if choice == "senet":
        return Passes(True, True, True)
    N, _, height, width = output_size(x, weight, stride, padding)
    tiles = N * -(-height // _TILE) * -(-width // _TILE)
    if isa not in ("avx512", "avx2") or tiles < _LEAST_TILES:  # others: not measured
        return Passes()
    # On maps of 1, 2 or 5 rows and columns most of a tile is computed for nothing.
    filled = 2 * N * height * width >= tiles * _TILE**2
    return Passes(filled, filled, weight=True)


def _able(
    x: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> bool:
    """Whether the kernels can compute it, in less than 64 MB."""
    K, C = weight[:2]
    return (
        weight[2:] == (3, 3)
        and stride == (1, 1)
        and max(padding) <= _MOST_PADDING
        and C % _GROUP == K % _GROUP == 0
        and max(C, K) <= _MOST_CHANNELS
        and min(output_size(x, weight, stride, padding)) > 0
    )
