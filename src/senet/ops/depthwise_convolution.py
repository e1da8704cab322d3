"""The operator `senet::depthwise`: a depthwise convolution without bias, channels_last float32.

N images, C channels, H × W pixels, OH × OW of the result, k the kernel's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from senet.ops.description import Again, Description

T = TypeVar("T")


class Arguments(NamedTuple):
    """What the convolution takes.

    Attributes:
        x: (N,C,H,W).
        weight: (C,1,k,k).
        stride, padding: the same in both directions.
    """

    x: Tensor
    weight: Tensor
    stride: int = 1
    padding: int = 0


class Outputs(NamedTuple):
    """The result and what serves the backward pass.

    Attributes:
        y: (N,C,OH,OW).
        packed: (k²,C), the weights in the kernels' order.
    """

    y: Tensor
    packed: Tensor


class Saved(NamedTuple):
    """What the backward pass takes, as in `Arguments` and `Outputs`."""

    x: Tensor
    weight: Tensor
    packed: Tensor
    stride: int
    padding: int


class Gradients(NamedTuple, Generic[T]):
    """One T for each argument that is differentiated."""

    x: T
    weight: T


def result_side(side: Any, kernel: int, stride: int, padding: int) -> Any:
    """Pixels of the result along an axis."""
    return (side + 2 * padding - kernel) // stride + 1


def empty_outputs(a: Arguments) -> Outputs:
    """Uninitialized results."""
    x, k = a.x, a.weight.shape[-1]
    sides = (result_side(side, k, a.stride, a.padding) for side in x.shape[2:])
    shape = (*x.shape[:2], *sides)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return Outputs(y, a.weight.new_empty((k * k, x.shape[1])))


def empty_gradients(saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """Uninitialized gradients, None where not wanted."""
    x, weight = saved.x, saved.weight
    last = torch.channels_last
    return Gradients(
        torch.empty_like(x, memory_format=last) if wanted.x else None,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted.weight else None,
    )


def _again(saved: Saved, _: Sequence[Tensor | None], __: Sequence[Any], gradient: Tensor) -> Again:
    return Again(arguments_of(saved), (), gradient)


def arguments_of(saved: Any) -> Arguments:
    """The arguments among what was saved."""
    return Arguments(saved.x, saved.weight, saved.stride, saved.padding)


def _flops(a: Any) -> int:
    """Of shapes."""
    sides = (result_side(s, a.weight[-1], a.stride, a.padding) for s in a.x[2:])
    return int(2 * a.x[0] * a.x[1] * prod(sides) * prod(a.weight[1:]))


def _backward_flops(saved: Any, wanted: Gradients[bool]) -> int:
    return sum(wanted) * _flops(arguments_of(saved))


DEPTHWISE = Description(
    name="depthwise",
    arguments=Arguments,
    outputs=Outputs,
    saved=Saved,
    gradients=Gradients,
    save=lambda a, out: Saved(a.x, a.weight, out.packed, a.stride, a.padding),
    empty_outputs=empty_outputs,
    empty_gradients=empty_gradients,
    save_again=lambda _: (),
    again=_again,
    flops=_flops,
    backward_flops=_backward_flops,
)
