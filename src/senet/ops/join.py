"""The closed form of SE behind joined branches, in pure PyTorch for any device.

A join is y = s ⊙ concat(relu(BN(x_i))), with gates s of the whole concat. A ReLU does not commute
with the squeeze, so the activations are summed on their way: the joined map is written once,
scaled, and never read. With m = [BN(x) > 0], g the gradient of y and d that of the squeeze divided
by the number of pixels, the gradient of an activation is s·g + d; the sums of m·g, m and of both
times x - mean give the gate's gradients and, once s and d are known, the norm's. So the backward
pass reads x and g twice, as that of BN → ReLU alone does, and keeps no map but the branches' x.

Shapes as in `senet.ops.algebra`, K branches of C_i channels, C of all together. `join` and
`join_backward` have the signatures of the operators `senet::join` and `senet::join_backward`;
`senet.ops.join_cpu` has the same two in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.ops.algebra import (
    batch_statistics,
    excite,
    excite_backward,
    map_gradient,
    memory_format,
    pixel_mean,
    pixel_sum,
    running_statistics,
)
from senet.ops.reference import accumulator, full_precision, spread

# What normalizes a branch, as cpu_types.h counts it. NONE: it goes in as it is, without ReLU.
NONE, RUNNING, BATCH = 0, 1, 2
ROWS = 5  # of the statistics: mean, inv_std, unbiased var, scale = weight * inv_std, shift = bias

JoinOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def format_of(maps: Sequence[Tensor]) -> torch.memory_format:
    """channels_last if one of the maps is, and not also contiguous."""
    formats = {memory_format(x) for x in maps} - {torch.contiguous_format}
    return formats.pop() if formats else torch.contiguous_format


def empty_join(maps: Sequence[Tensor], hidden_width: int) -> JoinOutput:
    """Uninitialized y (N,C,*), statistics (5,C), squeezed (N,C), hidden (N,h), gates (N,C)."""
    x = maps[0]
    N, C = x.shape[0], sum(m.shape[1] for m in maps)
    gated = C if hidden_width else 0
    y = torch.empty(
        (N, C, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=format_of(maps)
    )
    shapes = ((ROWS, C), (N, gated), (N, hidden_width), (N, gated))
    small = (torch.empty(s, dtype=accumulator(x.dtype), device=x.device) for s in shapes)
    statistics, squeezed, hidden, gates = small
    return y, statistics, squeezed, hidden, gates


def empty_join_gradients(
    maps: Sequence[Tensor], hidden_width: int, wanted: Sequence[bool]
) -> list[Tensor]:
    """Uninitialized gradients that are wanted, in the order of `join_backward`."""
    layout, h = format_of(maps), hidden_width
    C = sum(x.shape[1] for x in maps)
    vectors = [(x.shape[1],) for x in maps]
    shapes = [x.shape for x in maps] + 2 * vectors + [(h, C), (h,), (C, h), (C,)]
    kinds = [(maps[0].dtype, layout)] * len(maps)
    kinds += [(accumulator(maps[0].dtype), torch.contiguous_format)] * (2 * len(maps) + 4)
    return [
        torch.empty(shape, dtype=dtype, device=maps[0].device, memory_format=order)
        for shape, (dtype, order), want in zip(shapes, kinds, wanted, strict=True)
        if want
    ]


def _rows(
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    normalization: int,
    eps: float,
) -> Tensor:
    """Statistics (5,C_i) of a branch u in the accumulation type."""
    one, zero = u.new_ones(u.shape[1]), u.new_zeros(u.shape[1])
    own = (zero, one, zero)
    if normalization == BATCH:
        own = batch_statistics(u, eps)[1]
    elif normalization == RUNNING:
        own = running_statistics(mean, variance, u.dtype, eps)
    scale = own[1] if weight is None else own[1] * weight.to(u.dtype)
    return torch.stack((*own, scale, zero if bias is None else bias.to(u.dtype)))


def _activation(u: Tensor, rows: Tensor, normalization: int) -> Tensor:
    if normalization == NONE:
        return u
    return F.relu((u - spread(rows[0], u)) * spread(rows[3], u) + spread(rows[4], u))


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
    """y = s ⊙ concat(relu(norm(x_i))) and what its backward pass needs.

    Args:
        maps: K maps (N,C_i,*) of one floating type; sums are kept in at least float32.
        weights, biases: (C_i,) each, or None for 1 and 0.
        means, variances: (C_i,), read where the normalization is RUNNING.
        w1, b1, w2, b2: (h,C), (h,), (C,h), (C,); w1 and w2 None for no gate.
        normalizations: of each map NONE, RUNNING or BATCH.
        eps: added to the variances.
        gate: one of `reference.GATES`.

    Returns:
        y (N,C,*); statistics (5,C); squeezed (N,C): mean of the activations; hidden (N,h); gates
        (N,C). The last three are empty without a gate.
    """
    x = maps[0]
    if x.numel() == 0:
        outputs = empty_join(maps, 0 if w1 is None else w1.shape[0])
        for output in outputs:
            output.zero_()
        return outputs
    parts = list(zip(weights, biases, means, variances, normalizations, eps, strict=True))
    with full_precision(x.device.type):
        inputs = [t.to(accumulator(x.dtype)) for t in maps]
        rows = [_rows(u, *part) for u, part in zip(inputs, parts, strict=True)]
        active = [
            _activation(u, r, kind) for u, r, kind in zip(inputs, rows, normalizations, strict=True)
        ]
        absent = inputs[0].new_empty((x.shape[0], 0))
        squeezed, hidden, gates = absent, absent.clone(), absent.clone()
        if w1 is not None and w2 is not None:
            squeezed = torch.cat([pixel_mean(v) for v in active], 1)
            hidden, gates = excite(squeezed, w1, b1, w2, b2, gate)
            shares = gates.split([v.shape[1] for v in active], 1)
            active = [v * spread(s, v) for v, s in zip(active, shares, strict=True)]
        y = torch.cat([v.to(x.dtype) for v in active], 1).contiguous(memory_format=format_of(maps))
        return y, torch.cat(rows, 1), squeezed, hidden, gates


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
    """The `wanted` gradients: of K maps, K weights, K biases, w1, b1, w2, b2.

    Args:
        gradient: (N,C,*) of y.
        wanted: one flag for each of them.
        others: as given to and returned by `join`.
    """
    count, dtype = len(maps), accumulator(maps[0].dtype)
    sizes = [x.shape[1] for x in maps]
    layout = format_of(maps)
    found: list[Any] = [None] * (3 * count + 4)
    with full_precision(gradient.device.type):
        rows = statistics.split(sizes, 1)
        inputs = [x.to(dtype) for x in maps]
        branches = list(zip(inputs, rows, normalizations, strict=True))
        active = [_activation(*branch) for branch in branches]
        inner = [g.to(dtype) for g in gradient.split(sizes, 1)]  # becomes that of the activations
        if w1 is not None and w2 is not None:
            ds = torch.cat([pixel_sum(g * v) for g, v in zip(inner, active, strict=True)], 1)
            dz, dhidden, dt = excite_backward(ds, w1, w2, hidden, gates, gate)
            found[3 * count :] = [
                dhidden.t() @ squeezed,
                dhidden.sum(0),
                dt.t() @ hidden,
                dt.sum(0),
            ]
            share = (dz / max(maps[0][:1, :1].numel(), 1)).split(sizes, 1)
            scaled = zip(inner, gates.split(sizes, 1), share, strict=True)
            inner = [spread(s, g) * g + spread(d, g) for g, s, d in scaled]
        for i, (u, r, kind) in enumerate(branches):
            g = inner[i]
            if kind != NONE:
                g = torch.where(active[i] <= 0, 0, g)
                found[2 * count + i] = pixel_sum(g).sum(0)
                found[count + i] = pixel_sum(g * (u - spread(r[0], u))).sum(0) * r[1]
            dx = g * spread(r[3], u)
            if kind == BATCH:
                dx = map_gradient(g, u, r, r[3], found[count + i], found[2 * count + i])
            found[i] = dx.to(maps[i].dtype).contiguous(memory_format=layout)
    return [t for t, want in zip(found, wanted, strict=True) if want]
