"""The join in C++: `forward` and `backward`, for non-empty maps on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from senet.ops.cpu.common import (
    ACCUMULATORS,
    ACTIVATION_NUMBERS,
    GATE_NUMBERS,
    JOIN_BLOCK,
    JOIN_BRANCH,
    call,
    numbers,
)
from senet.ops.description import Momenta
from senet.ops.join import (
    GIVEN,
    JOIN,
    Arguments,
    Gradients,
    Outputs,
    Saved,
    channels,
    empty_gradients,
    empty_outputs,
)
from senet.ops.maps import common_format


def _sizes(
    maps: Sequence[Tensor], y: Tensor, hidden: int, a: Arguments | Saved
) -> tuple[float, ...]:
    """The first eleven entries of JoinArguments."""
    N, C = y.shape[0], y.shape[1]
    P = y.numel() // (N * C)
    channels_last = P == 1 or common_format(maps) is not torch.contiguous_format
    threads = torch.get_num_threads()
    return (
        *(N, C, P, hidden, len(maps), channels_last, threads, GATE_NUMBERS[a.gate]),
        ACTIVATION_NUMBERS[a.activation],
        ACTIVATION_NUMBERS[a.hidden_activation],
        a.negative_slope,
    )


def forward(a: Arguments, momenta: Momenta | None) -> Outputs:
    """y and what `backward` needs."""
    maps, w1 = a.maps, a.w1
    hidden, dtype, layout = (
        0 if w1 is None else w1.shape[0],
        ACCUMULATORS[maps[0].dtype],
        common_format(maps),
    )
    kept: list[Tensor] = []
    outputs = empty_outputs(a)
    block = [
        JOIN_BLOCK.pack(
            *_sizes(maps, outputs.y, hidden, a),
            *(numbers(t, dtype, kept) for t in (w1, a.b1, a.w2, a.b2)),
            *(t.data_ptr() for t in outputs),
            *(0,) * 5,
        )
    ]
    norms = zip(a.weights, a.biases, a.means, a.variances, strict=True)
    for x, norm, kind, eps in zip(maps, norms, a.normalizations, a.eps, strict=True):
        x = x.contiguous(memory_format=layout)
        kept.append(x)
        addresses = (numbers(t, dtype, kept) for t in norm)
        block.append(
            JOIN_BRANCH.pack(x.shape[1], kind, *addresses, eps, 0.0, x.data_ptr(), 0, 0, 0)
        )
    call("join_forward", maps[0], b"".join(block))
    if momenta is not None:
        JOIN.move(a, outputs, momenta)
    return outputs


def once_more(saved: Saved) -> Tensor:
    """y to the bit as `forward` computed it for what it saved."""
    maps, layout = saved.maps, common_format(saved.maps)
    x = maps[0]
    C = sum(channels(maps))
    hidden = 0 if saved.w1 is None else saved.w1.shape[0]
    shape = (x.shape[0], C, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, memory_format=layout)
    small = (saved.statistics, saved.squeezed, saved.hidden, saved.gates)
    addresses = (*(0,) * 4, y.data_ptr(), *(t.data_ptr() for t in small), *(0,) * 5)
    block = [JOIN_BLOCK.pack(*_sizes(maps, y, hidden, saved), *addresses)]
    kept = [m.contiguous(memory_format=layout) for m in maps]
    for m in kept:
        branch = (m.shape[1], GIVEN, *(0, 0, 0, 0, 0.0, 0.0), m.data_ptr(), 0, 0, 0)
        block.append(JOIN_BRANCH.pack(*branch))
    call("join_forward", x, b"".join(block))
    return y


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, from that of y."""
    maps, w1 = saved.maps, saved.w1
    dtype, layout = ACCUMULATORS[maps[0].dtype], common_format(maps)
    width = 0 if w1 is None else w1.shape[0]
    kept: list[Tensor] = []
    found = empty_gradients(saved, wanted)
    gradient = gradient.to(maps[0].dtype).contiguous(memory_format=layout)
    small = (saved.statistics, saved.squeezed, saved.hidden, saved.gates)
    block = [
        JOIN_BLOCK.pack(
            *_sizes(maps, gradient, width, saved),
            *(numbers(w1, dtype, kept), 0, numbers(saved.w2, dtype, kept), 0, 0),
            *(numbers(t, dtype, kept) for t in small),
            gradient.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in found[3:]),
        )
    ]
    outputs = zip(found.maps, found.weights, found.biases, strict=True)
    for x, kind, branch in zip(maps, saved.normalizations, outputs, strict=True):
        x = x.contiguous(memory_format=layout)
        kept.append(x)
        block.append(
            JOIN_BRANCH.pack(
                *(x.shape[1], kind),
                *(0, 0, 0, 0, 0.0, 0.0, x.data_ptr()),
                *(0 if t is None else t.data_ptr() for t in branch),
            )
        )
    call("join_backward", maps[0], b"".join(block))
    return found
