"""Which pass of a convolution runs in which kernel: a fixed rule over shapes and instruction sets.

Nothing is timed at run time. A resumed run, another process and another day take the same kernels,
and so give the same digits; a choice by stopwatch would not.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from senet import kernels
from senet.errors import UserError
from senet.ops.convolution.description import output_size

_NAMES = ("auto", "direct", "torch", "senet")

# Fewer tiles of 4x4 outputs do not pay for the transforms of the weights.
_LEAST_TILES, _TILE = 32, 4
# What the kernels take, see `kernels/convolution/arguments.h`; channels of a group are multiples.
_GROUP, _MOST_PADDING = 16, 2
# Smaller groups run several as one, with zeros between: of fewer channels most would be zeros.
_LEAST_GROUP = 4
# Of groups of so many channels PyTorch's kernels are sometimes the faster ones.
_NARROW = 32
_SLOW_GROUP = 8  # with AVX2, for the gradient of the weights
# Of a 1x1 convolution the weights' gradient is ours where PyTorch's is slow: many inputs, many
# outputs and few positions.
_LEAST_WIDE, _LEAST_OUTPUTS, _MOST_POSITIONS = 1024, 512, 1600
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
            measured to be faster), "direct" (the same without Winograd's transforms), "torch"
            (never) or "senet" (wherever they can).

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
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int = 1,
) -> Passes:
    """What the kernels compute of float32 maps, channels_last, in that many groups of channels.

    Args:
        x: (N,C,H,W).
        weight: (K,C/groups,h,w).
        stride, padding: along H and W.
        groups: of channels.
    """
    return _passes(x, weight, stride, padding, groups, _choice, kernels.instruction_set())


def packed(weight: Sequence[int], groups: int) -> int:
    """How many groups of weights (K,C/groups,h,w) run as one; 0: the kernels do not take them."""
    channels, outputs = weight[1], weight[0] // groups
    if channels % _GROUP == outputs % _GROUP == 0:
        return 1
    if channels != outputs or channels < _LEAST_GROUP or _GROUP % channels:
        return 0
    together = _GROUP // channels
    return together if groups % together == 0 else 0


@functools.lru_cache(4096)
def _passes(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    choice: str,
    isa: str,
) -> Passes:
    able = _able(x, weight, stride, padding, groups)
    if choice == "torch" or not isa or not able.weight:
        return Passes()
    if choice == "senet":
        return able
    if choice == "direct" and able.forward:  # 3x3: Winograd's
        return Passes()
    if isa not in ("avx512", "avx2"):  # others: not measured
        return Passes()
    N, K, height, width = output_size(x, weight, stride, padding)
    if not able.forward:
        wide = x[1] >= _LEAST_WIDE and K >= _LEAST_OUTPUTS and N * height * width <= _MOST_POSITIONS
        return Passes(weight=wide and isa == "avx512")
    tiles = N * -(-height // _TILE) * -(-width // _TILE)
    if tiles < _LEAST_TILES:
        return Passes()
    # On maps of 1, 2 or 5 rows and columns most of a tile is computed for nothing.
    filled = 2 * N * height * width >= tiles * _TILE**2
    if groups == 1 or weight[1] > _NARROW:
        return Passes(filled, filled, weight=True)
    if isa == "avx512":
        maps = filled and weight[1] == _LEAST_GROUP
        return Passes(maps, maps, weight=True)
    return Passes(filled, filled, weight[1] != _SLOW_GROUP)


def _able(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> Passes:
    """What the kernels can compute, in less than 64 MB."""
    K, C = weight[:2]
    if (
        packed(weight, groups) == 0
        or max(C, K) > _MOST_CHANNELS
        or min(output_size(x, weight, stride, padding)) <= 0
    ):
        return Passes()
    if weight[2:] == (3, 3) and stride == (1, 1) and max(padding) <= _MOST_PADDING:
        return Passes(True, True, True)
    point = weight[2:] == (1, 1) and stride[0] == stride[1] and max(padding) == 0
    return Passes(weight=point and C % _GROUP == 0)
