"""The closed form of the join, forward and backward: docs/algebra.md, section 6.

An activation does not commute with the squeeze, so the activations are summed on their way: the
joined map is written once, scaled, and never read, and the backward pass keeps no map but the
branches'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from senet.ops.algebra.common import (
    batch_statistics,
    excite,
    excite_backward,
    map_gradient,
    pixel_mean,
    pixel_sum,
    running_statistics,
    through,
)
from senet.ops.join import (
    BATCH,
    NONE,
    RUNNING,
    Arguments,
    Gradients,
    Outputs,
    Saved,
    channels,
    empty_outputs,
)
from senet.ops.maps import accumulator, common_format, full_precision, spread, stored
from senet.ops.reference import activate


def _rows(
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    normalization: int,
    eps: float,
) -> Tensor:
    """Statistics (ROWS,C_i) of a branch u in the accumulation type."""
    one, zero = u.new_ones(u.shape[1]), u.new_zeros(u.shape[1])
    own = (zero, one, zero)
    if normalization == BATCH:
        own = batch_statistics(u, eps)[1]
    elif normalization == RUNNING:
        own = running_statistics(mean, variance, u.dtype, eps)
    scale = own[1] if weight is None else own[1] * weight.to(u.dtype)
    return torch.stack((*own, scale, zero if bias is None else bias.to(u.dtype)))


def _normalized(u: Tensor, rows: Tensor) -> Tensor:
    mean, _, _, scale, shift = rows
    return (u - spread(mean, u)) * spread(scale, u) + spread(shift, u)


def _activation(u: Tensor, rows: Tensor, normalization: int, a: Arguments | Saved) -> Tensor:
    if normalization == NONE:
        return u
    return activate(_normalized(u, rows), a.activation, a.negative_slope)


def forward(a: Arguments) -> Outputs:
    """y and what its backward pass needs."""
    maps, kinds = a.maps, a.normalizations
    x = maps[0]
    if x.numel() == 0:
        outputs = empty_outputs(a)
        for output in outputs:
            output.zero_()
        return outputs
    norms = zip(a.weights, a.biases, a.means, a.variances, kinds, a.eps, strict=True)
    with full_precision(x.device.type):
        inputs = [t.to(accumulator(x.dtype)) for t in maps]
        rows = [_rows(u, *norm) for u, norm in zip(inputs, norms, strict=True)]
        active = [_activation(*branch, a) for branch in zip(inputs, rows, kinds, strict=True)]
        absent = inputs[0].new_empty((x.shape[0], 0))
        squeezed, hidden, gates = absent, absent.clone(), absent.clone()
        if a.w1 is not None and a.w2 is not None:
            squeezed = torch.cat([pixel_mean(v) for v in active], 1)
            gate = (a.w1, a.b1, a.w2, a.b2, a.gate, a.hidden_activation)
            hidden, gates = excite(squeezed, *gate)
            shares = gates.split(channels(maps), 1)
            active = [v * spread(s, v) for v, s in zip(active, shares, strict=True)]
        y = torch.cat([v.to(x.dtype) for v in active], 1)
        y = stored(y, x.dtype, common_format(maps))
        return Outputs(y, torch.cat(rows, 1), squeezed, hidden, gates)


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, and others, from that of y."""
    maps, kinds, w1, w2 = saved.maps, saved.normalizations, saved.w1, saved.w2
    dtype, sizes, layout = accumulator(maps[0].dtype), channels(maps), common_format(maps)
    with full_precision(gradient.device.type):
        rows = saved.statistics.split(sizes, 1)
        inputs = [x.to(dtype) for x in maps]
        active = [_activation(*branch, saved) for branch in zip(inputs, rows, kinds, strict=True)]
        inner = [g.to(dtype) for g in gradient.split(sizes, 1)]  # becomes that of the activations
        of_gate: list[Tensor | None] = [None] * 4
        if w1 is not None and w2 is not None:
            ds = torch.cat([pixel_sum(g * v) for g, v in zip(inner, active, strict=True)], 1)
            hidden, gates = saved.hidden, saved.gates
            functions = (saved.gate, saved.hidden_activation)
            dz, dhidden, dt = excite_backward(ds, w1, w2, hidden, gates, *functions)
            of_gate = [
                (dhidden.t() @ saved.squeezed).reshape(w1.shape),
                dhidden.sum(0),
                (dt.t() @ activate(hidden, saved.hidden_activation)).reshape(w2.shape),
                dt.sum(0),
            ]
            share = (dz / max(maps[0][:1, :1].numel(), 1)).split(sizes, 1)
            scaled = zip(inner, gates.split(sizes, 1), share, strict=True)
            inner = [spread(s, g) * g + spread(d, g) for g, s, d in scaled]
        found: Gradients[Tensor | None] = Gradients([], [], [], *of_gate)
        for x, u, g, r, kind in zip(maps, inputs, inner, rows, kinds, strict=True):
            mean, inv_std, _, scale, _ = r
            dweight = dbias = None
            if kind != NONE:
                g = through(g, _normalized(u, r), saved.activation, saved.negative_slope)
                dbias = pixel_sum(g).sum(0)
                dweight = pixel_sum(g * (u - spread(mean, u))).sum(0) * inv_std
            dx = g * spread(scale, u)
            if kind == BATCH and dweight is not None and dbias is not None:
                dx = map_gradient(g, u, r, scale, dweight, dbias)
            found.maps.append(dx.to(x.dtype).contiguous(memory_format=layout))
            found.weights.append(dweight)
            found.biases.append(dbias)
    return found
