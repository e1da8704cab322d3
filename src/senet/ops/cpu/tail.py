"""The tail in C++: `forward` and `backward`, for a non-empty x on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from senet.kernels.structs import Normalization, Shortcut
from senet.ops.cpu.common import (
    ACCUMULATORS,
    ACTIVATION_NUMBERS,
    GATE_NUMBERS,
    TAIL_BLOCK,
    call,
    numbers,
)
from senet.ops.description import Momenta
from senet.ops.maps import dense
from senet.ops.tail import (
    Arguments,
    Gradients,
    Outputs,
    Saved,
    empty_gradients,
    empty_outputs,
    final_activation,
    statistics_rows,
)

_NORMALIZATIONS = {kind.name.lower(): int(kind) for kind in Normalization}
_NONE, _PLAIN, _NORMALIZED = map(int, Shortcut)
_NO_NORM = (0, 0, 0, 0, 0.0, 0.0)
_NO_BACKWARD = (0,) * 11


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return dense(x)


def _like(t: Tensor | None, x: Tensor, kept: list[Tensor]) -> int:
    """Address of t with the dtype and memory order of x; a copy is put into `kept`."""
    if t is None:
        return 0
    if t.dtype is not x.dtype or t.stride() != x.stride():
        t = torch.empty_like(x).copy_(t)
        kept.append(t)
    return t.data_ptr()


def _sizes(
    x: Tensor, hidden: int, a: Arguments | Saved, activation: str, kind: int
) -> tuple[float, ...]:
    """The block's first eleven entries."""
    N, C = x.shape[0], x.shape[1]
    P = x.numel() // (N * C)
    return (
        N,
        C,
        P,
        hidden,
        P == 1 or not x.is_contiguous(),
        torch.get_num_threads(),
        GATE_NUMBERS[a.gate],
        ACTIVATION_NUMBERS[activation],
        _NORMALIZATIONS[a.normalization],
        kind,
        a.negative_slope,
    )


def _run(
    a: Arguments, outputs: tuple[int, ...], momentum: float | None, shortcut_momentum: float | None
) -> None:
    """Run the forward kernel.

    Args:
        a: the operator's arguments, x dense.
        outputs: addresses of y, statistics, squeezed, hidden, gates.
        momentum, shortcut_momentum: move the running statistics by that; None leaves them.
    """
    x, normalization = a.x, a.normalization
    dtype = ACCUMULATORS[x.dtype]
    kept: list[Tensor] = []
    moved: list[tuple[Tensor, Tensor]] = []

    def running(t: Tensor | None, momentum: float | None) -> int:
        if t is None or (momentum is None and normalization == "batch"):
            return 0
        address = numbers(t, dtype, kept)
        if momentum is not None and address != t.data_ptr():
            moved.append((t, kept[-1]))
        return address

    shortcut_norm = _NO_NORM
    if a.normalize_shortcut:
        shortcut_norm = (
            numbers(a.shortcut_weight, dtype, kept),
            numbers(a.shortcut_bias, dtype, kept),
            running(a.shortcut_mean, shortcut_momentum),
            running(a.shortcut_var, shortcut_momentum),
            a.shortcut_eps,
            shortcut_momentum or 0.0,
        )
    w1 = a.w1
    kind = _NONE if a.shortcut is None else _NORMALIZED if a.normalize_shortcut else _PLAIN
    arguments = TAIL_BLOCK.pack(
        *_sizes(x, 0 if w1 is None else w1.shape[0], a, final_activation(a), kind),
        numbers(a.weight, dtype, kept),
        numbers(a.bias, dtype, kept),
        running(a.running_mean, momentum),
        running(a.running_var, momentum),
        a.eps,
        momentum or 0.0,
        *shortcut_norm,
        x.data_ptr(),
        _like(a.shortcut, x, kept),
        numbers(w1, dtype, kept),
        numbers(a.b1, dtype, kept),
        numbers(a.w2, dtype, kept),
        numbers(a.b2, dtype, kept),
        *outputs,
        *_NO_BACKWARD,
    )
    call("tail_forward", x, arguments)
    for t, copy in moved:
        t.copy_(copy)


def forward(a: Arguments, momenta: Momenta | None) -> Outputs:
    """y and what `backward` needs: all but y in one allocation, unless the dispatcher calls."""
    x = _dense(a.x)
    if x is not a.x:
        a = a._replace(x=x)
    if momenta is None:
        outputs = empty_outputs(a)
        _run(a, tuple(0 if t is None else t.data_ptr() for t in outputs), None, None)
        return outputs
    w1 = a.w1
    N, C, dtype = x.shape[0], x.shape[1], ACCUMULATORS[x.dtype]
    rows = statistics_rows(a.normalization, a.normalize_shortcut)
    hidden, gated = (0, 0) if w1 is None else (w1.shape[0], C)
    y = torch.empty_like(x)
    small = torch.empty(rows * C + N * (2 * gated + hidden), dtype=dtype)
    places = _places(small.data_ptr(), small.element_size(), N, C, rows, hidden, gated)
    _run(a, (y.data_ptr(), *places), *momenta)
    return Outputs(y, small, None, None, None)


def relu_of_normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor
) -> Tensor:
    """relu(norm(x)) to the bit as `forward` computed it, without a gate and a shortcut.

    Args:
        x: the same map.
        weight, bias: (C,) or None, of its normalization.
        statistics: that `forward` returned.
    """
    x = _dense(x)
    y = torch.empty_like(x)
    a = Arguments(x, weight=weight, bias=bias, normalization="given", relu=True)
    _run(a, (y.data_ptr(), statistics.data_ptr(), 0, 0, 0), None, None)
    return y


def _places(
    start: int, size: int, N: int, C: int, rows: int, hidden: int, gated: int
) -> tuple[int, int, int, int]:
    """Addresses of statistics, squeezed, hidden and gates in the tensor of `forward`."""
    squeezed = start + size * rows * C
    after = squeezed + size * N * gated
    return start, squeezed, after, after + size * N * hidden


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, from that of y."""
    x = _dense(saved.x)
    if x is not saved.x:
        saved = saved._replace(x=x)
    w1, y, normalize_shortcut = saved.w1, saved.y, saved.normalize_shortcut
    activation = final_activation(saved)
    statistics, normalization = saved.statistics, saved.normalization
    N, C, dtype = x.shape[0], x.shape[1], ACCUMULATORS[x.dtype]
    width = 0 if w1 is None else w1.shape[0]
    kept: list[Tensor] = []
    places: tuple[int, ...]
    if saved.squeezed is None:
        rows = statistics_rows(normalization, normalize_shortcut)
        size = statistics.element_size()
        places = _places(statistics.data_ptr(), size, N, C, rows, width, C if width else 0)
    else:
        small = (statistics, saved.squeezed, saved.hidden, saved.gates)
        places = tuple(numbers(t, dtype, kept) for t in small)
    found = empty_gradients(saved, wanted)
    addresses = [0 if t is None else t.data_ptr() for t in found]
    if found.shortcut is not None and activation == "linear" and not normalize_shortcut:
        found.shortcut.copy_(gradient)
        addresses[Gradients._fields.index("shortcut")] = 0
    shortcut_norm: tuple[float, ...] = _NO_NORM
    if normalize_shortcut:
        weights = (saved.shortcut_weight, saved.shortcut_bias)
        shortcut_norm = (*(numbers(t, dtype, kept) for t in weights), 0, 0, 0.0, 0.0)
    plain = y is not None or saved.shortcut is not None
    kind = _NORMALIZED if normalize_shortcut else _PLAIN if plain else _NONE
    arguments = TAIL_BLOCK.pack(
        *_sizes(x, width, saved, activation, kind),
        numbers(saved.weight, dtype, kept),
        numbers(saved.bias, dtype, kept),
        0,
        0,
        0.0,
        0.0,
        *shortcut_norm,
        x.data_ptr(),
        _like(saved.shortcut, x, kept),
        numbers(w1, dtype, kept),
        0,
        numbers(saved.w2, dtype, kept),
        0,
        _like(y, x, kept),
        *places,
        _like(gradient, x, kept),
        *addresses,
    )
    call("tail_backward", x, arguments)
    return found
