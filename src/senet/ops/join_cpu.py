"""The C++ kernels of the join behind the signatures of `senet.ops.join`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from senet.ops.cpu import ACCUMULATORS, GATE_NUMBERS, JOIN_BLOCK, JOIN_BRANCH, call, numbers
from senet.ops.join import JoinOutput, empty_join, empty_join_gradients, format_of


def _sizes(maps: Sequence[Tensor], y: Tensor, hidden: int, gate: str) -> tuple[int, ...]:
    """The first eight entries of JoinArguments."""
    N, C = y.shape[0], y.shape[1]
    P = y.numel() // (N * C)
    channels_last = P == 1 or format_of(maps) is not torch.contiguous_format
    threads = torch.get_num_threads()
    return (N, C, P, hidden, len(maps), channels_last, threads, GATE_NUMBERS[gate])


def join(
    maps: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    means: list[Tensor | None],
    variances: list[Tensor | None],
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    normalizations: list[int],
    eps: list[float],
    gate: str,
) -> JoinOutput:
    """`senet.ops.join.join` in C++, for non-empty maps on the CPU."""
    hidden, dtype, layout = (
        0 if w1 is None else w1.shape[0],
        ACCUMULATORS[maps[0].dtype],
        format_of(maps),
    )
    kept: list[Tensor] = []
    outputs = empty_join(maps, hidden)
    block = [
        JOIN_BLOCK.pack(
            *_sizes(maps, outputs[0], hidden, gate),
            *(numbers(t, dtype, kept) for t in (w1, b1, w2, b2)),
            *(t.data_ptr() for t in outputs),
            *(0,) * 5,
        )
    ]
    for i, x in enumerate(maps):
        x = x.contiguous(memory_format=layout)
        kept.append(x)
        given = (weights[i], biases[i], means[i], variances[i])
        norm = (numbers(t, dtype, kept) for t in given)
        block.append(
            JOIN_BRANCH.pack(
                x.shape[1], normalizations[i], *norm, eps[i], 0.0, x.data_ptr(), 0, 0, 0
            )
        )
    call("join_forward", maps[0], b"".join(block))
    return outputs


def join_backward(
    gradient: Tensor,
    maps: list[Tensor],
    w1: Tensor | None,
    w2: Tensor | None,
    statistics: Tensor,
    squeezed: Tensor,
    hidden: Tensor,
    gates: Tensor,
    normalizations: list[int],
    gate: str,
    wanted: list[bool],
) -> list[Tensor]:
    """`senet.ops.join.join_backward` in C++, for non-empty maps on the CPU."""
    count, dtype, layout = len(maps), ACCUMULATORS[maps[0].dtype], format_of(maps)
    width = 0 if w1 is None else w1.shape[0]
    kept: list[Tensor] = []
    found = empty_join_gradients(maps, width, wanted)
    outputs = iter(found)
    addresses = [next(outputs).data_ptr() if want else 0 for want in wanted]
    gradient = gradient.to(maps[0].dtype).contiguous(memory_format=layout)
    small = (statistics, squeezed, hidden, gates)
    block = [
        JOIN_BLOCK.pack(
            *_sizes(maps, gradient, width, gate),
            *(numbers(w1, dtype, kept), 0, numbers(w2, dtype, kept), 0, 0),
            *(numbers(t, dtype, kept) for t in small),
            gradient.data_ptr(),
            *addresses[3 * count :],
        )
    ]
    for i, x in enumerate(maps):
        x = x.contiguous(memory_format=layout)
        kept.append(x)
        block.append(
            JOIN_BRANCH.pack(
                *(x.shape[1], normalizations[i]),
                *(0, 0, 0, 0, 0.0, 0.0, x.data_ptr()),
                *addresses[i : 3 * count : count],
            )
        )
    call("join_backward", maps[0], b"".join(block))
    return found
