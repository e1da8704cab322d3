"""The operator `senet::tail`: y = act(s ⊙ norm(x) + norm(shortcut)), s the gate of norm(x).

Every part but x is optional: SE alone, BN → ReLU and the whole end of a residual branch are this
operator. N images, C channels, P pixels, h the gate's hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from senet.ops.description import Again, Description, Momenta, move_running
from senet.ops.maps import accumulator, dense

T = TypeVar("T")


class Arguments(NamedTuple):
    """What the tail takes.

    Attributes:
        x: (N,C,*spatial), any floating type; sums are kept in at least float32.
        shortcut: like x, or None.
        weight, bias: (C,) or None for 1 and 0.
        running_mean, running_var: (C,), read when `normalization` is "running".
        shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var: the same for the shortcut.
        w1, b1, w2, b2: (h,C), (h,), (C,h), (C,); w1 and w2 None for no gate. Weights may be those
            of 1x1 convolutions.
        normalization: "batch", "running" or "none".
        normalize_shortcut: whether the shortcut has a normalization of its own.
        eps, shortcut_eps: added to the variances.
        gate: one of `reference.GATES`.
        relu: whether the ReLU is applied.
        activation: without `relu` what is applied in its place, one of
            `reference.BRANCH_ACTIVATIONS`.
        negative_slope: of "leaky_relu".
    """

    x: Tensor
    shortcut: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    shortcut_weight: Tensor | None = None
    shortcut_bias: Tensor | None = None
    shortcut_mean: Tensor | None = None
    shortcut_var: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    normalization: str = "none"
    normalize_shortcut: bool = False
    eps: float = 0.0
    shortcut_eps: float = 0.0
    gate: str = "sigmoid"
    relu: bool = False
    activation: str = "linear"
    negative_slope: float = 0.0


class Outputs(NamedTuple):
    """y and what the backward pass needs beside it.

    Attributes:
        y: like x.
        statistics: (0|3|6,C): mean, inv_std, unbiased var of x, then of a normalized shortcut.
        squeezed: (N,C), mean of x over the pixels of an image; like the next two, empty without a
            gate, and None where it lies behind `statistics` in the same memory.
        hidden: (N,h).
        gates: (N,C).
    """

    y: Tensor
    statistics: Tensor
    squeezed: Tensor | None
    hidden: Tensor | None
    gates: Tensor | None


class Saved(NamedTuple):
    """What the backward pass takes, as in `Arguments` and `Outputs`.

    Attributes:
        y: where the ReLU's mask comes from if there is a plain shortcut; otherwise None: the mask
            is computed again from x (and a normalized shortcut).
        shortcut: only a normalized one, or where another activation than the ReLU follows, whose
            derivative is taken at the sum.
    """

    x: Tensor
    y: Tensor | None
    shortcut: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    shortcut_weight: Tensor | None
    shortcut_bias: Tensor | None
    w1: Tensor | None
    w2: Tensor | None
    statistics: Tensor
    squeezed: Tensor | None
    hidden: Tensor | None
    gates: Tensor | None
    normalization: str
    normalize_shortcut: bool
    gate: str
    relu: bool
    activation: str
    negative_slope: float


class Gradients(NamedTuple, Generic[T]):
    """One T for each argument that is differentiated."""

    x: T
    shortcut: T
    weight: T
    bias: T
    shortcut_weight: T
    shortcut_bias: T
    w1: T
    b1: T
    w2: T
    b2: T


def _plain_shortcut(a: Arguments) -> bool:
    return a.shortcut is not None and not a.normalize_shortcut


def final_activation(a: Arguments | Saved) -> str:
    """What the tail ends with, one of `reference.BRANCH_ACTIVATIONS`."""
    return "relu" if a.relu else a.activation


def _save(a: Arguments, out: Outputs) -> Saved:
    """x, and y or the shortcut for the activation; everything else is of (N,C) size."""
    behind = final_activation(a) not in ("linear", "relu")
    return Saved(
        a.x,
        out.y if a.relu and _plain_shortcut(a) else None,
        a.shortcut if a.normalize_shortcut or behind else None,
        a.weight,
        a.bias,
        a.shortcut_weight,
        a.shortcut_bias,
        a.w1,
        a.w2,
        *out[1:],
        a.normalization,
        a.normalize_shortcut,
        a.gate,
        a.relu,
        a.activation,
        a.negative_slope,
    )


def statistics_rows(normalization: str, normalize_shortcut: bool) -> int:
    """Rows of the statistics."""
    return 0 if normalization == "none" else 6 if normalize_shortcut else 3


def empty_outputs(a: Arguments) -> Outputs:
    """Uninitialized results."""
    x, (N, C) = dense(a.x), a.x.shape[:2]
    gated, hidden = (0, 0) if a.w1 is None else (C, a.w1.shape[0])
    shapes = ((statistics_rows(a.normalization, a.normalize_shortcut), C), (N, gated))
    small = [
        torch.empty(shape, dtype=accumulator(x.dtype), device=x.device)
        for shape in (*shapes, (N, hidden), (N, gated))
    ]
    return Outputs(torch.empty_like(x), *small)


def empty_gradients(saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """Uninitialized gradients for a dense x, None where not wanted."""
    x, w1, w2 = saved.x, saved.w1, saved.w2
    dtype, device = accumulator(x.dtype), x.device

    def numbers(want: bool, *shape: int) -> Tensor | None:
        # a tuple of sizes would cost half as much again, on small maps a part of the call's time
        return torch.empty(*shape, dtype=dtype, device=device) if want else None

    C, h = x.shape[1], 0 if w1 is None else w1.shape[0]
    return Gradients(
        torch.empty_like(x) if wanted.x else None,
        torch.empty_like(x) if wanted.shortcut else None,
        numbers(wanted.weight, C),
        numbers(wanted.bias, C),
        numbers(wanted.shortcut_weight, C),
        numbers(wanted.shortcut_bias, C),
        None if w1 is None else numbers(wanted.w1, *w1.shape),
        numbers(wanted.b1, h),
        None if w2 is None else numbers(wanted.w2, *w2.shape),
        numbers(wanted.b2, C),
    )


def _empty_gradients(saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    return empty_gradients(saved._replace(x=dense(saved.x)), wanted)


def _save_again(a: Arguments) -> tuple[Tensor | None, ...]:
    return a.b1, a.b2


def _again(
    saved: Saved, biases: Sequence[Tensor | None], options: Sequence[Any], gradient: Tensor
) -> Again:
    """A plain shortcut is not kept: of relu(v + shortcut) only the mask counts, which y tells."""
    normalization, normalize_shortcut, eps, shortcut_eps, gate, relu, activation, slope = options
    known = {}
    if saved.y is not None:
        gradient = torch.where(saved.y <= 0, 0, gradient)
        known["shortcut"] = gradient
        relu = False
    mean = var = shortcut_mean = shortcut_var = None
    if normalization == "running":
        rows, C = statistics_rows(normalization, normalize_shortcut), saved.x.shape[1]
        statistics = saved.statistics.flatten()[: rows * C].view(rows, C)
        mean, var = statistics[0], statistics[2]
        if normalize_shortcut:
            shortcut_mean, shortcut_var = statistics[3], statistics[5]
    b1, b2 = biases
    arguments = Arguments(
        x=saved.x,
        shortcut=saved.shortcut,
        weight=saved.weight,
        bias=saved.bias,
        running_mean=mean,
        running_var=var,
        shortcut_weight=saved.shortcut_weight,
        shortcut_bias=saved.shortcut_bias,
        shortcut_mean=shortcut_mean,
        shortcut_var=shortcut_var,
        w1=saved.w1,
        b1=b1,
        w2=saved.w2,
        b2=b2,
        normalization=normalization,
        normalize_shortcut=normalize_shortcut,
        eps=eps,
        shortcut_eps=shortcut_eps,
        gate=gate,
        relu=relu,
        activation=activation,
        negative_slope=slope,
    )
    return Again(arguments, (None, None), gradient, known)


def _flops(a: Any) -> int:
    """Of shapes: the gate's two products."""
    return 0 if a.w1 is None else 2 * 2 * a.x[0] * a.x[1] * a.w1[0]


def _backward_flops(saved: Any, wanted: Gradients[bool]) -> int:
    """Each product has two gradients; those of unwanted weights are not computed."""
    if saved.w1 is None:
        return 0
    through = wanted.x or wanted.weight or wanted.bias or any(wanted[6:])
    return 2 * saved.x[0] * saved.x[1] * saved.w1[0] * (2 * through + wanted.w1 + wanted.w2)


def _move(a: Arguments, out: Outputs, momenta: Momenta) -> None:
    """Momenta of x's normalization and of the shortcut's."""
    own, shortcut = momenta
    move_running(a.running_mean, a.running_var, own, out.statistics[:3])
    move_running(a.shortcut_mean, a.shortcut_var, shortcut, out.statistics[3:])


def _passes(a: Arguments) -> int | None:
    """Without an activation the gradient of a plain shortcut is that of y itself."""
    return (
        None
        if final_activation(a) != "linear" or not _plain_shortcut(a)
        else Gradients._fields.index("shortcut")
    )


TAIL = Description(
    name="tail",
    arguments=Arguments,
    outputs=Outputs,
    saved=Saved,
    gradients=Gradients,
    save=_save,
    empty_outputs=empty_outputs,
    empty_gradients=_empty_gradients,
    save_again=_save_again,
    again=_again,
    flops=_flops,
    backward_flops=_backward_flops,
    move=_move,
    passes=_passes,
    added=("activation", "negative_slope"),
)
