"""The join in Triton: `forward` and `backward`, for non-empty maps that `takes` accepts.

Each branch for itself: forward its moments, one pass that sums its activation, one that writes it
scaled; backward one pass of sums and one for its gradient. PyTorch concatenates several branches,
takes their gradient apart, and does what arithmetic of (N,C) size is no product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senet.ops.description import Momenta
from senet.ops.join import (
    BATCH,
    JOIN,
    NONE,
    Arguments,
    Gradients,
    Outputs,
    Saved,
    channels,
    empty_gradients,
    empty_outputs,
)
from senet.ops.maps import common_format
from senet.ops.triton.common import GATE_BLOCKS, Call, like, numbers, on

_SUMS = 5  # of `branch_sums_kernel`


def _functions(a: Arguments | Saved, kind: int, call: Call) -> dict[str, Any]:
    """Compile-time constants of a branch's kernels."""
    activation = "linear" if kind == NONE else a.activation
    return {"ACTIVATION": activation, "SLOPE": float(a.negative_slope), "ACC": call.acc}


def forward(a: Arguments, momenta: Momenta | None) -> Outputs:
    """y and what `backward` needs."""
    layout, sizes = common_format(a.maps), channels(a.maps)
    maps = [x.detach().contiguous(memory_format=layout) for x in a.maps]
    with on(maps[0]):
        outputs = empty_outputs(a)
        hidden_width = 0 if a.w1 is None else a.w1.shape[0]
        calls = [Call(x, hidden_width) for x in maps]
        norms = zip(a.weights, a.biases, a.means, a.variances, a.normalizations, a.eps, strict=True)
        rows = [_rows(call, x, *norm) for call, x, norm in zip(calls, maps, norms, strict=True)]
        torch.cat(rows, 1, out=outputs.statistics)
        branches = list(zip(calls, maps, rows, a.normalizations, strict=True))
        shares: list[Tensor | None] = [None] * len(maps)
        if a.w1 is not None:
            squeezes = [_squeeze(call, x, r, _functions(a, k, call)) for call, x, r, k in branches]
            torch.cat(squeezes, 1, out=outputs.squeezed)
            _excite(a, outputs, calls[0])
            shares = [s.contiguous() for s in outputs.gates.split(sizes, 1)]
        parts = []
        for (call, x, r, kind), s in zip(branches, shares, strict=True):
            y, cut = outputs.y if len(maps) == 1 else torch.empty_like(x), call.element
            call.launch(
                call.maps.branch_kernel,
                cut.programs,
                *(x, y, r, s, call.C, call.P, cut.splits, cut.tiles),
                **_functions(a, kind, call),
                **cut.constants,
            )
            parts.append(y)
        if len(maps) > 1:
            torch.cat(parts, 1, out=outputs.y)
        if momenta is not None:
            JOIN.move(a, outputs, momenta)
    return outputs


def _rows(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    normalization: int,
    eps: float,
) -> Tensor:
    """Statistics (ROWS,C) of a branch."""
    rows = call.empty(5, call.C)
    if normalization == NONE:
        rows.zero_()
        rows[1] = rows[3] = 1
        return rows
    batch = normalization == BATCH
    moments = call.moments(x, second=True) if batch else (None, None)
    running = (None, None) if batch else (numbers(mean, call.dtype), numbers(variance, call.dtype))
    call.statistics(rows, 0, moments, running, eps, None)
    rows[3] = rows[1] if weight is None else rows[1] * weight.detach()
    rows[4] = 0 if bias is None else bias.detach()
    return rows


def _squeeze(call: Call, x: Tensor, rows: Tensor, functions: dict[str, Any]) -> Tensor:
    """(N,C): means of a branch's activation over the pixels of an image."""
    cut = call.sums
    parts, squeezed = call.empty(call.N * cut.splits, call.C), call.empty(call.N, call.C)
    call.launch(
        call.maps.branch_squeeze_kernel,
        cut.programs,
        *(x, parts, rows, call.C, call.P, cut.splits, cut.tiles),
        **functions,
        **cut.constants,
    )
    call.merge(parts, squeezed, mean=False)
    return squeezed.div_(call.P)


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
    layout, sizes = common_format(saved.maps), channels(saved.maps)
    maps = [x.detach().contiguous(memory_format=layout) for x in saved.maps]
    w1, w2 = saved.w1, saved.w2
    with on(maps[0]):
        calls = [Call(x, 0 if w1 is None else w1.shape[0]) for x in maps]
        found = empty_gradients(saved, wanted)
        parts = [g.contiguous(memory_format=layout) for g in gradient.split(sizes, 1)]
        gradients = [g for g in map(like, parts, maps) if g is not None]
        rows = [r.contiguous() for r in saved.statistics.split(sizes, 1)]
        branches = list(zip(calls, maps, rows, saved.normalizations, gradients, strict=True))
        sums = [_sums(*branch, saved) for branch in branches]
        shares: list[Tensor | None] = [None] * len(maps)
        insides: list[Tensor | None] = [None] * len(maps)
        if w1 is not None and w2 is not None:
            dz = _gate_gradients(saved, torch.cat([s[4] for s in sums], 1), calls[0], found)
            shares = list(saved.gates.split(sizes, 1))
            insides = list((dz / calls[0].P).split(sizes, 1))
        results = zip(found.maps, found.weights, found.biases, strict=True)
        for (call, x, r, kind, g), s, d, of, (dx, dweight, dbias) in zip(
            branches, shares, insides, sums, results, strict=True
        ):
            a1, a2, n1, n2, _ = of.double()
            if s is not None and d is not None:
                a1, a2 = s * a1 + d * n1, s * a2 + d * n2
            bias, weight = a1.sum(0), a2.sum(0) * r[1]
            if dbias is not None:
                dbias.copy_(bias)
            if dweight is not None:
                dweight.copy_(weight)
            if dx is None:
                continue
            scale, inv_std = r[3].double(), r[1].double()
            per_image = call.empty(2, call.N, call.C)
            per_image[0] = scale if s is None else s * scale
            per_image[1] = 0 if d is None else d * scale
            per_channel = torch.zeros_like(r[:2])
            if kind == BATCH:
                per_channel[0] = scale * inv_std * weight / -call.M
                per_channel[1] = scale * bias / -call.M
            cut = call.element
            call.launch(
                call.maps.branch_gradient_kernel,
                cut.programs,
                *(g, x, dx, r, per_image, per_channel),
                *(call.N, call.C, call.P, cut.splits, cut.tiles),
                **_functions(saved, kind, call),
                **cut.constants,
            )
    return found


def _sums(call: Call, x: Tensor, rows: Tensor, kind: int, g: Tensor, saved: Saved) -> Tensor:
    """(5,N,C) sums over the pixels of an image, see `branch_sums_kernel`."""
    cut = call.sums
    parts = call.empty(_SUMS, call.N * cut.splits, call.C)
    call.launch(
        call.maps.branch_sums_kernel,
        cut.programs,
        *(g, x, parts, rows, call.C, call.P, call.N * cut.splits, cut.splits, cut.tiles),
        **_functions(saved, kind, call),
        **cut.constants,
    )
    if cut.splits == 1:
        return parts
    sums = call.empty(_SUMS, call.N, call.C)
    call.merge(parts, sums, mean=False)
    return sums


def _gate_gradients(
    saved: Saved, ds: Tensor, call: Call, found: Gradients[Tensor | None]
) -> Tensor:
    """Fill the gradients of the gate's weights that are wanted; returns dz (N,C)."""
    sizes = N, C, H = _gate_sizes(saved.squeezed, saved.hidden)
    w1, w2 = numbers(saved.w1, call.dtype), numbers(saved.w2, call.dtype)
    dhidden, dz = call.empty(N, H), call.empty(N, C)
    # The kernels take gain · second + offset · first of two sums; without a norm 1 and 0.
    sums = torch.stack((torch.zeros_like(ds), ds))
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
