"""The operator `senet::convolution`: a convolution without bias and dilation.

N images, C channels, H, W; K output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from senet.ops.description import Again, Description
from senet.ops.maps import memory_format

T = TypeVar("T")


class Arguments(NamedTuple):
    """What the convolution takes.

    Attributes:
        x: (N,C,H,W).
        weight: (K,C/groups,kernel_h,kernel_w).
        stride, padding: along H and W.
        groups: of channels; the outputs of one see its inputs only.
    """

    x: Tensor
    weight: Tensor
    stride: list[int]
    padding: list[int]
    groups: int


class Outputs(NamedTuple):
    """y (N,K,OH,OW), channels_last where x or the weight is."""

    y: Tensor


class Saved(NamedTuple):
    """What the backward pass takes: the arguments."""

    x: Tensor
    weight: Tensor
    stride: list[int]
    padding: list[int]
    groups: int


class Gradients(NamedTuple, Generic[T]):
    """Something of each argument that is differentiated; gradients lie in memory as these do."""

    x: T
    weight: T


def output_size(
    x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int, int]:
    """(N,K,OH,OW)."""
    height, width = ((x[2 + i] + 2 * padding[i] - weight[2 + i]) // stride[i] + 1 for i in range(2))
    return x[0], weight[0], height, width


def output_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """That of y."""
    formats = {memory_format(x), memory_format(weight)}
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def _empty_outputs(a: Arguments) -> Outputs:
    size = output_size(a.x.shape, a.weight.shape, a.stride, a.padding)
    layout = output_format(a.x, a.weight)
    return Outputs(torch.empty(size, dtype=a.x.dtype, device=a.x.device, memory_format=layout))


def empty_like(t: Tensor) -> Tensor:
    """Uninitialized, dense, in the memory order of t."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format(t))


def _empty_gradients(saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    return Gradients(
        empty_like(saved.x) if wanted.x else None,
        empty_like(saved.weight) if wanted.weight else None,
    )


def _again(saved: Saved, _: Sequence[Any], __: Sequence[Any], gradient: Tensor) -> Again:
    return Again(Arguments(*saved), (), gradient)


def _flops(a: Any) -> int:
    """Of shapes."""
    N, K, OH, OW = output_size(a.x, a.weight, a.stride, a.padding)
    return 2 * N * K * OH * OW * a.weight[1] * a.weight[2] * a.weight[3]


def _backward_flops(saved: Any, wanted: Gradients[bool]) -> int:
    return _flops(saved) * (wanted.x + wanted.weight)


CONVOLUTION = Description(
    name="convolution",
    arguments=Arguments,
    outputs=Outputs,
    saved=Saved,
    gradients=Gradients,
    save=lambda a, _: Saved(*a),
    empty_outputs=_empty_outputs,
    empty_gradients=_empty_gradients,
    save_again=lambda _: (),
    again=_again,
    flops=_flops,
    backward_flops=_backward_flops,
)
