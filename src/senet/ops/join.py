"""The operator `senet::join`: y = s ⊙ concat(act(norm(x_i))), s the gate of the whole concat.

With one branch BN → activation → SE, the order of MBConv and RegNetY; with several the end of an
Inception module; without a gate BN → activation of each branch and their concatenation. K branches
of C_i channels, C of all together; N images, h the gate's hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from senet.ops.description import Again, Description, Momenta, move_running
from senet.ops.maps import accumulator, common_format

T = TypeVar("T")

# What normalizes a branch, as the kernels count it. NONE: it goes in as it is, without activation.
# GIVEN: statistics and gates of an earlier pass, in C++ only.
NONE, RUNNING, BATCH, GIVEN = 0, 1, 2, 3
ROWS = 5  # of the statistics: mean, inv_std, unbiased var, scale = weight * inv_std, shift = bias


class Arguments(NamedTuple):
    """What the join takes: lists have an entry a branch.

    Attributes:
        maps: (N,C_i,*spatial), of one floating type.
        weights, biases: (C_i,) or None for 1 and 0.
        means, variances: (C_i,), read where the normalization is RUNNING.
        w1, b1, w2, b2: (h,C), (h,), (C,h), (C,); w1 and w2 None for no gate. Weights may be those
            of 1x1 convolutions.
        normalizations: NONE, RUNNING or BATCH.
        eps: added to the variance.
        gate: one of `reference.GATES`.
        activation: of the normalized branches, one of `reference.BRANCH_ACTIVATIONS`.
        negative_slope: of "leaky_relu".
        hidden_activation: of the gate, one of `reference.HIDDEN_ACTIVATIONS`.
    """

    maps: list[Tensor]
    weights: list[Tensor | None]
    biases: list[Tensor | None]
    means: list[Tensor | None]
    variances: list[Tensor | None]
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    normalizations: list[int]
    eps: list[float]
    gate: str
    activation: str = "relu"
    negative_slope: float = 0.0
    hidden_activation: str = "relu"


class Outputs(NamedTuple):
    """y and what the backward pass needs beside it.

    Attributes:
        y: (N,C,*spatial).
        statistics: (ROWS,C).
        squeezed: (N,C), mean of the concat over the pixels of an image; like the next two, empty
            without a gate.
        hidden: (N,h), what the hidden activation sees; of "relu", what it gives.
        gates: (N,C).
    """

    y: Tensor
    statistics: Tensor
    squeezed: Tensor
    hidden: Tensor
    gates: Tensor


class Saved(NamedTuple):
    """What the backward pass takes, as in `Arguments` and `Outputs`."""

    maps: list[Tensor]
    w1: Tensor | None
    w2: Tensor | None
    statistics: Tensor
    squeezed: Tensor
    hidden: Tensor
    gates: Tensor
    normalizations: list[int]
    gate: str
    activation: str
    negative_slope: float
    hidden_activation: str


class Gradients(NamedTuple, Generic[T]):
    """One T for each argument that is differentiated, or for each of its branches."""

    maps: list[T]
    weights: list[T]
    biases: list[T]
    w1: T
    b1: T
    w2: T
    b2: T


def _save(a: Arguments, out: Outputs) -> Saved:
    functions = (a.gate, a.activation, a.negative_slope, a.hidden_activation)
    return Saved(a.maps, a.w1, a.w2, *out[1:], a.normalizations, *functions)


def channels(maps: list[Tensor]) -> list[int]:
    """C_i."""
    return [x.shape[1] for x in maps]


def empty_outputs(a: Arguments) -> Outputs:
    """Uninitialized results."""
    x, C = a.maps[0], sum(channels(a.maps))
    N, h = x.shape[0], 0 if a.w1 is None else a.w1.shape[0]
    gated = C if h else 0
    y = torch.empty(
        (N, C, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=common_format(a.maps)
    )
    shapes = ((ROWS, C), (N, gated), (N, h), (N, gated))
    small = (torch.empty(s, dtype=accumulator(x.dtype), device=x.device) for s in shapes)
    return Outputs(y, *small)


def empty_gradients(saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """Uninitialized gradients, None where not wanted."""
    maps, layout = saved.maps, common_format(saved.maps)
    w1, w2, dtype, device = saved.w1, saved.w2, accumulator(maps[0].dtype), maps[0].device

    def numbers(want: bool, *shape: int) -> Tensor | None:
        return torch.empty(*shape, dtype=dtype, device=device) if want else None

    C, h = sum(channels(maps)), 0 if w1 is None else w1.shape[0]
    return Gradients(
        [
            torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
            if want
            else None
            for x, want in zip(maps, wanted.maps, strict=True)
        ],
        [numbers(want, x.shape[1]) for x, want in zip(maps, wanted.weights, strict=True)],
        [numbers(want, x.shape[1]) for x, want in zip(maps, wanted.biases, strict=True)],
        None if w1 is None else numbers(wanted.w1, *w1.shape),
        numbers(wanted.b1, h),
        None if w2 is None else numbers(wanted.w2, *w2.shape),
        numbers(wanted.b2, C),
    )


def _save_again(a: Arguments) -> tuple[Tensor | None, ...]:
    return (*a.weights, *a.biases, a.b1, a.b2)


def _again(
    saved: Saved, kept: Sequence[Tensor | None], options: Sequence[Any], gradient: Tensor
) -> Again:
    K = len(saved.maps)
    rows = saved.statistics.split(channels(saved.maps), 1)
    normalizations, eps, *functions = options
    arguments = Arguments(
        maps=saved.maps,
        weights=list(kept[:K]),
        biases=list(kept[K : 2 * K]),
        means=[row[0] for row in rows],
        variances=[row[2] for row in rows],
        w1=saved.w1,
        b1=kept[-2],
        w2=saved.w2,
        b2=kept[-1],
        normalizations=normalizations,
        eps=eps,
        **dict(zip(Arguments._fields[-4:], functions, strict=True)),
    )
    return Again(arguments, (None,) * K, gradient)


def _flops(a: Any) -> int:
    """Of shapes: the gate's two products."""
    if a.w1 is None:
        return 0
    return 2 * 2 * a.maps[0][0] * sum(shape[1] for shape in a.maps) * a.w1[0]


def _backward_flops(saved: Any, wanted: Gradients[bool]) -> int:
    """Each product has two gradients; those of unwanted weights are not computed."""
    if saved.w1 is None:
        return 0
    product = 2 * saved.maps[0][0] * sum(shape[1] for shape in saved.maps) * saved.w1[0]
    through = any(map(any, wanted[:3])) or any(wanted[3:])
    return product * (2 * through + wanted.w1 + wanted.w2)


def _move(a: Arguments, out: Outputs, momenta: Momenta) -> None:
    rows = out.statistics.split(channels(a.maps), 1)
    for mean, var, momentum, row in zip(a.means, a.variances, momenta, rows, strict=True):
        move_running(mean, var, momentum, row)


JOIN = Description(
    name="join",
    arguments=Arguments,
    outputs=Outputs,
    saved=Saved,
    gradients=Gradients,
    save=_save,
    empty_outputs=empty_outputs,
    empty_gradients=empty_gradients,
    save_again=_save_again,
    again=_again,
    flops=_flops,
    backward_flops=_backward_flops,
    move=_move,
    added=("activation", "negative_slope", "hidden_activation"),
)
