"""The C++ kernels of the tail behind the signatures of `senet.ops.algebra`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senet import kernels
from senet.kernels.structs import (
    Gate,
    JoinArguments,
    JoinBranch,
    Normalization,
    Shortcut,
    TailArguments,
    packer,
)
from senet.ops.algebra import (
    TailOutput,
    dense,
    empty_gradients,
    empty_outputs,
    statistics_rows,
)
from senet.ops.reference import GATES, accumulator

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
ACCUMULATORS = {dtype: accumulator(dtype) for dtype in STORAGE}
_NORMALIZATIONS = {kind.name.lower(): int(kind) for kind in Normalization}
_NONE, _PLAIN, _NORMALIZED = map(int, Shortcut)
GATE_NUMBERS = {name: int(Gate[name.upper()]) for name in GATES}

# Each packed in one call, because on small maps the time of the arguments is that of the kernel.
_BLOCK = packer(TailArguments)
JOIN_BLOCK = packer(JoinArguments)
JOIN_BRANCH = packer(JoinBranch)
_NO_NORM = (0, 0, 0, 0, 0.0, 0.0)
_NO_BACKWARD = (0,) * 11


def unsupported(x: Tensor) -> str:
    """Why the kernels cannot take x; empty if they can."""
    if kernels.LIBRARY is None:
        return kernels.MISSING
    if x.device.type != "cpu":
        return f"the C++ kernels run on the CPU, the input is on {x.device}"
    if x.dtype not in STORAGE:
        return f"the C++ kernels take float32, bfloat16 and float64, the input is {x.dtype}"
    return ""


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


def numbers(t: Tensor | None, dtype: torch.dtype, kept: list[Tensor]) -> int:
    """Address of t as contiguous numbers of the accumulation type; a copy is put into `kept`."""
    if t is None:
        return 0
    if t.dtype is not dtype or not t.is_contiguous():
        t = t.to(dtype).contiguous()
        kept.append(t)
    return t.data_ptr()


def _sizes(
    x: Tensor, hidden: int, gate: str, relu: bool, normalization: str, kind: int
) -> tuple[int, ...]:
    """The block's first ten entries."""
    N, C = x.shape[0], x.shape[1]
    P = x.numel() // (N * C)
    return (
        N,
        C,
        P,
        hidden,
        P == 1 or not x.is_contiguous(),
        torch.get_num_threads(),
        GATE_NUMBERS[gate],
        relu,
        _NORMALIZATIONS[normalization],
        kind,
    )


def call(name: str, x: Tensor, arguments: bytes) -> None:
    """Run a kernel of the library for maps of the dtype of x."""
    if getattr(kernels.LIBRARY, f"senet_{name}")(STORAGE[x.dtype], arguments):
        raise MemoryError("no memory for the partial sums of senet's kernels")


def _forward(
    x: Tensor,
    inputs: tuple[Any, ...],
    outputs: tuple[int, ...],
    momentum: float | None,
    shortcut_momentum: float | None,
) -> None:
    """Run the forward kernel.

    Args:
        x: the map, dense.
        inputs: all arguments of `tail` but x.
        outputs: addresses of y, statistics, squeezed, hidden, gates.
        momentum, shortcut_momentum: move the running statistics by that; None leaves them.
    """
    (shortcut, weight, bias, mean, var, s_weight, s_bias, s_mean, s_var) = inputs[:9]
    (w1, b1, w2, b2, normalization, normalize_shortcut, eps, s_eps, gate, relu) = inputs[9:]
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
    if normalize_shortcut:
        shortcut_norm = (
            numbers(s_weight, dtype, kept),
            numbers(s_bias, dtype, kept),
            running(s_mean, shortcut_momentum),
            running(s_var, shortcut_momentum),
            s_eps,
            shortcut_momentum or 0.0,
        )
    kind = _NONE if shortcut is None else _NORMALIZED if normalize_shortcut else _PLAIN
    arguments = _BLOCK.pack(
        *_sizes(x, 0 if w1 is None else w1.shape[0], gate, relu, normalization, kind),
        numbers(weight, dtype, kept),
        numbers(bias, dtype, kept),
        running(mean, momentum),
        running(var, momentum),
        eps,
        momentum or 0.0,
        *shortcut_norm,
        x.data_ptr(),
        _like(shortcut, x, kept),
        numbers(w1, dtype, kept),
        numbers(b1, dtype, kept),
        numbers(w2, dtype, kept),
        numbers(b2, dtype, kept),
        *outputs,
        *_NO_BACKWARD,
    )
    call("tail_forward", x, arguments)
    for t, copy in moved:
        t.copy_(copy)


def tail(x: Tensor, *rest: Any) -> TailOutput:
    """`senet.ops.algebra.tail` in C++, for a non-empty x on the CPU."""
    x = _dense(x)
    w1, normalization, normalize_shortcut = rest[9], rest[13], rest[14]
    rows = statistics_rows(normalization, normalize_shortcut)
    outputs = empty_outputs(x, rows, 0 if w1 is None else w1.shape[0])
    _forward(x, rest, tuple(t.data_ptr() for t in outputs), None, None)
    return outputs


def tail_packed(
    x: Tensor, rest: tuple[Any, ...], momentum: float | None, shortcut_momentum: float | None
) -> tuple[Tensor, Tensor]:
    """`tail` with its small results in one tensor, and the running statistics moved.

    Args:
        x: as in `tail`.
        rest: the other arguments of `tail`.
        momentum, shortcut_momentum: weight of the batch in the running statistics of the two
            normalizations; None leaves them as they are.

    Returns:
        y, and statistics, squeezed, hidden, gates one after the other as `tail_backward` takes
        them.
    """
    x = _dense(x)
    w1 = rest[9]
    N, C, dtype = x.shape[0], x.shape[1], ACCUMULATORS[x.dtype]
    rows = statistics_rows(rest[13], rest[14])
    hidden, gated = (0, 0) if w1 is None else (w1.shape[0], C)
    y = torch.empty_like(x)
    small = torch.empty(rows * C + N * (2 * gated + hidden), dtype=dtype)
    places = _places(small.data_ptr(), small.element_size(), N, C, rows, hidden, gated)
    _forward(x, rest, (y.data_ptr(), *places), momentum, shortcut_momentum)
    return y, small


def relu_of_normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor
) -> Tensor:
    """relu(norm(x)) to the bit as `tail_packed` computed it, without a gate and a shortcut.

    Args:
        x: the same map.
        weight, bias: (C,) or None, of its normalization.
        statistics: what `tail_packed` returned beside y.
    """
    x = _dense(x)
    y = torch.empty_like(x)
    absent = (None,) * 6
    rest = (None, weight, bias, *absent, *absent[:4], "given", False, 0.0, 0.0, "sigmoid", True)
    _forward(x, rest, (y.data_ptr(), statistics.data_ptr(), 0, 0, 0), None, None)
    return y


def _places(
    start: int, size: int, N: int, C: int, rows: int, hidden: int, gated: int
) -> tuple[int, int, int, int]:
    """Addresses of statistics, squeezed, hidden and gates in the tensor of `tail_packed`."""
    squeezed = start + size * rows * C
    after = squeezed + size * N * gated
    return start, squeezed, after, after + size * N * hidden


def tail_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    shortcut: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    statistics: Tensor,
    squeezed: Tensor | None,
    hidden: Tensor | None,
    gates: Tensor | None,
    normalization: str,
    normalize_shortcut: bool,
    gate: str,
    relu: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """`senet.ops.algebra.tail_backward` in C++, for a non-empty x on the CPU.

    `squeezed`, `hidden` and `gates` are None where `statistics` is the tensor of `tail_packed`.
    """
    x = _dense(x)
    N, C, dtype = x.shape[0], x.shape[1], ACCUMULATORS[x.dtype]
    width = 0 if w1 is None else w1.shape[0]
    kept: list[Tensor] = []
    places: tuple[int, ...]
    if squeezed is None:
        rows = statistics_rows(normalization, normalize_shortcut)
        size = statistics.element_size()
        places = _places(statistics.data_ptr(), size, N, C, rows, width, C if width else 0)
    else:
        places = tuple(numbers(t, dtype, kept) for t in (statistics, squeezed, hidden, gates))
    found = empty_gradients(x, width, wanted)
    outputs = iter(found)
    addresses = [next(outputs).data_ptr() if want else 0 for want in wanted]
    if wanted[1] and not relu and not normalize_shortcut:
        found[int(wanted[0])].copy_(gradient)
        addresses[1] = 0
    shortcut_norm = _NO_NORM
    if normalize_shortcut:
        weights = (numbers(shortcut_weight, dtype, kept), numbers(shortcut_bias, dtype, kept))
        shortcut_norm = (*weights, 0, 0, 0.0, 0.0)
    kind = _NORMALIZED if normalize_shortcut else _PLAIN if relu and y is not None else _NONE
    arguments = _BLOCK.pack(
        *_sizes(x, width, gate, relu, normalization, kind),
        numbers(weight, dtype, kept),
        numbers(bias, dtype, kept),
        0,
        0,
        0.0,
        0.0,
        *shortcut_norm,
        x.data_ptr(),
        _like(shortcut, x, kept),
        numbers(w1, dtype, kept),
        0,
        numbers(w2, dtype, kept),
        0,
        _like(y, x, kept),
        *places,
        _like(gradient, x, kept),
        *addresses,
    )
    call("tail_backward", x, arguments)
    return found
