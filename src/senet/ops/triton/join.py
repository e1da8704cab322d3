"""The join in Triton: `forward` and `backward`, for non-empty maps that `takes` accepts.

Each branch for itself: forward its moments, one pass that sums its activation, one that writes it
scaled; backward one pass of sums and one for its gradient. PyTorch concatenates several branches
and takes their gradient apart; of one it does nothing, as each of its calls costs the host as much
as a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from senet.ops.description import Momenta, move_running
from senet.ops.join import (
    BATCH,
    NONE,
    ROWS,
    Arguments,
    Gradients,
    Outputs,
    Saved,
    channels,
    empty_gradients,
    empty_outputs,
)
from senet.ops.maps import common_format
from senet.ops.triton.common import GATE_BLOCKS, Call, like, moves_in_kernel, numbers, on


def _functions(a: Arguments | Saved, kind: int, call: Call) -> dict[str, Any]:
    """Compile-time constants of a branch's kernels."""
    activation = "linear" if kind == NONE else a.activation
    return {"ACTIVATION": activation, "SLOPE": float(a.negative_slope), "ACC": call.acc}


def forward(a: Arguments, momenta: Momenta | None) -> Outputs:
    """y and what `backward` needs."""
    layout, sizes, one = common_format(a.maps), channels(a.maps), len(a.maps) == 1
    maps = [x.detach().contiguous(memory_format=layout) for x in a.maps]
    with on(maps[0]):
        outputs = empty_outputs(a)
        hidden_width = 0 if a.w1 is None else a.w1.shape[0]
        calls = [Call(x, hidden_width) for x in maps]
        rows = [outputs.statistics] if one else [call.empty(ROWS, call.C) for call in calls]
        moved = (None,) * len(maps) if momenta is None else momenta
        for branch, (call, x, out) in enumerate(zip(calls, maps, rows, strict=True)):
            _fill_rows(call, x, out, a, branch, moved[branch])
        if not one:
            torch.cat(rows, 1, out=outputs.statistics)
        branches = list(zip(calls, maps, rows, a.normalizations, strict=True))
        shares: list[Tensor | None] = [None] * len(maps)
        if a.w1 is not None:
            wholes = [outputs.squeezed] if one else [call.empty(call.N, call.C) for call in calls]
            for (call, x, r, kind), squeezed in zip(branches, wholes, strict=True):
                _fill_squeezed(call, x, r, squeezed, _functions(a, kind, call))
            if not one:
                torch.cat(wholes, 1, out=outputs.squeezed)
            _excite(a, outputs, calls[0])
            shares = list(_parts(outputs.gates, sizes))
        parts = []
        for (call, x, r, kind), s in zip(branches, shares, strict=True):
            y, cut = outputs.y if one else torch.empty_like(x), call.element
            call.launch(
                call.maps.branch_kernel,
                cut.programs,
                *(x, y, r, s, call.C, call.P, cut.splits, cut.tiles),
                **_functions(a, kind, call),
                **cut.constants,
            )
            parts.append(y)
        if not one:
            torch.cat(parts, 1, out=outputs.y)
    return outputs


def _parts(t: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The share of each branch in (N,C) numbers."""
    return [t] if len(sizes) == 1 else [part.contiguous() for part in t.split(sizes, 1)]


def _fill_rows(
    call: Call, x: Tensor, rows: Tensor, a: Arguments, branch: int, momentum: float | None
) -> None:
    """Fill the statistics (ROWS,C) of a branch, and move its running ones."""
    mean, variance = a.means[branch], a.variances[branch]
    normalization = a.normalizations[branch]
    if normalization == NONE:
        rows.zero_()
        rows[1] = rows[3] = 1
        return
    batch, dtype = normalization == BATCH, call.dtype
    moments = call.moments(x, second=True) if batch else (None, None)
    inside = momentum is not None and moves_in_kernel(mean, variance, dtype)
    if not batch:
        running = (numbers(mean, dtype), numbers(variance, dtype))
    else:
        running = (mean, variance) if inside else (None, None)
    affine = (numbers(a.weights[branch], dtype), numbers(a.biases[branch], dtype))
    call.statistics(rows, 0, moments, running, a.eps[branch], momentum if inside else None, affine)
    if batch and not inside:
        move_running(mean, variance, momentum, rows)


def _fill_squeezed(
    call: Call, x: Tensor, rows: Tensor, squeezed: Tensor, functions: dict[str, Any]
) -> None:
    """Fill (N,C): means of a branch's activation over the pixels of an image."""
    cut = call.sums
    chunks = squeezed if cut.splits == 1 else call.empty(call.N * cut.splits, call.C)
    call.launch(
        call.maps.branch_squeeze_kernel,
        cut.programs,
        *(x, chunks, rows, call.C, call.P, cut.splits, cut.tiles),
        **functions,
        **cut.constants,
    )
    if chunks is not squeezed:
        call.merge(chunks, squeezed, mean=True)


def _gate_sizes(squeezed: Tensor, hidden: Tensor) -> tuple[int, int, int]:
    return squeezed.shape[0], squeezed.shape[1], hidden.shape[1]


def _excite(a: Arguments, outputs: Outputs, call: Call) -> None:
    """Fill hidden and gates from squeezed."""
    w1, b1, w2, b2 = (numbers(t, call.dtype) for t in (a.w1, a.b1, a.w2, a.b2))
    squeezed, hidden = outputs.squeezed, outputs.hidden
    sizes = N, C, H = _gate_sizes(squeezed, hidden)
    blocks = {"HIDDEN": a.hidden_activation, "ACC": call.acc, **GATE_BLOCKS}
    call.launch(
        call.gate.hidden_kernel,
        call.tiles((N, "BLOCK_N"), (H, "BLOCK_H")),
        *(squeezed, None, None, None, w1, b1, hidden, *sizes),
        NORMALIZED=False,
        **blocks,
    )
    call.launch(
        call.gate.gates_kernel,
        call.tiles((N, "BLOCK_N"), (C, "BLOCK_C")),
        *(hidden, w2, b2, outputs.gates, *sizes),
        GATE=a.gate,
        **blocks,
    )


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, from that of y."""
    layout, sizes, w1 = common_format(saved.maps), channels(saved.maps), saved.w1
    one, gated = len(sizes) == 1, w1 is not None
    maps = [x.detach().contiguous(memory_format=layout) for x in saved.maps]
    with on(maps[0]):
        calls = [Call(x, 0 if w1 is None else w1.shape[0]) for x in maps]
        found = empty_gradients(saved, wanted)
        parts = [gradient] if one else gradient.split(sizes, 1)
        gradients = [
            like(g.contiguous(memory_format=layout), x) for g, x in zip(parts, maps, strict=True)
        ]
        rows = _parts(saved.statistics, sizes)
        branches = list(zip(calls, maps, rows, saved.normalizations, gradients, strict=True))
        sums = [_sums(*branch, saved) for branch in branches]
        nothing: list[Tensor | None] = [None] * len(maps)
        shares, inner = nothing, nothing
        if gated:
            ds = sums[0][3:] if one else torch.cat([s[3:] for s in sums], 2)
            shares = list(_parts(saved.gates, sizes))
            inner = list(_parts(_gate_gradients(saved, ds, calls[0], found), sizes))
        results = zip(found.maps, found.weights, found.biases, strict=True)
        for (call, x, r, kind, g), of, s, dz, (dx, dweight, dbias) in zip(
            branches, sums, shares, inner, results, strict=True
        ):
            per_channel = call.empty(2, call.C)
            call.launch(
                call.gate.branch_channels_kernel,
                -(-call.C // 16),
                *(of, r, s, dz, dweight, dbias, per_channel, call.N, call.C, call.P, call.M),
                BATCH=kind == BATCH,
                ACC=call.acc,
                BLOCK_N=64,
                BLOCK_C=16,
            )
            if dx is None:
                continue
            cut = call.element
            call.launch(
                call.maps.branch_gradient_kernel,
                cut.programs,
                *(g, x, dx, r, s, dz, per_channel, call.C, call.P, cut.splits, cut.tiles),
                **_functions(saved, kind, call),
                **cut.constants,
            )
    return found


def _sums(call: Call, x: Tensor, rows: Tensor, kind: int, g: Tensor | None, saved: Saved) -> Tensor:
    """(2|5,N,C) sums over the pixels of an image, see `branch_sums_kernel`."""
    cut, gated = call.sums, call.H > 0
    kinds = 5 if gated else 2
    parts = call.empty(kinds, call.N * cut.splits, call.C)
    call.launch(
        call.maps.branch_sums_kernel,
        cut.programs,
        *(g, x, parts, rows, call.C, call.P, call.N * cut.splits, cut.splits, cut.tiles),
        GATED=gated,
        **_functions(saved, kind, call),
        **cut.constants,
    )
    if cut.splits == 1:
        return parts
    sums = call.empty(kinds, call.N, call.C)
    call.merge(parts, sums, mean=False)
    return sums


def _gate_gradients(
    saved: Saved, sums: Tensor, call: Call, found: Gradients[Tensor | None]
) -> Tensor:
    """Fill the gradients of the gate's weights that are wanted; returns dz (N,C).

    Of sums (2,N,C) the kernels read the gates' gradient, the second, as there is no bias.
    """
    sizes = N, C, H = _gate_sizes(saved.squeezed, saved.hidden)
    w1, w2 = numbers(saved.w1, call.dtype), numbers(saved.w2, call.dtype)
    dhidden, dz = call.empty(N, H), call.empty(N, C)
    flags = {"NORMALIZED": False, "ACC": call.acc, "HIDDEN": saved.hidden_activation}
    options = {"GATE": saved.gate, **flags, **GATE_BLOCKS}
    norm = (None, None, None)
    call.launch(
        call.gate.hidden_gradient_kernel,
        call.tiles((N, "BLOCK_N"), (H, "BLOCK_H")),
        *(sums, saved.gates, saved.hidden, *norm, w2, dhidden, *sizes),
        **options,
    )
    call.launch(
        call.gate.squeeze_gradient_kernel,
        call.tiles((N, "BLOCK_N"), (C, "BLOCK_C")),
        *(dhidden, w1, dz, *sizes),
        ACC=call.acc,
        **GATE_BLOCKS,
    )
    outputs = (found.w1, found.b1, found.w2, found.b2)
    if any(t is not None for t in outputs):
        call.launch(
            call.gate.weight_gradients_kernel,
            call.tiles((H, "BLOCK_H"), (C, "BLOCK_C")),
            *(sums, saved.gates, saved.hidden, dhidden, saved.squeezed, *norm, *outputs, *sizes),
            **options,
        )
    return dz
