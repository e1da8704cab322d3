"""The closed form of the tail, forward and backward: docs/algebra.md, sections 1 and 2.

By linearity the squeeze z is BN of the per-image mean of x, which the batch statistics need anyway,
so two passes over x do; the backward pass needs two more, and keeps no map but x and y.
torch.compile turns this file into a few kernels.
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
from senet.ops.maps import accumulator, dense, full_precision, spread, stored
from senet.ops.reference import activate
from senet.ops.tail import Arguments, Gradients, Outputs, Saved, empty_outputs, final_activation


def _scale_shift(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a = weight * inv_std and the bias of a normalization (1 and 0 where None)."""
    a = statistics[1] if weight is None else statistics[1] * weight.to(statistics.dtype)
    b = torch.zeros_like(a) if bias is None else bias.to(statistics.dtype)
    return a, b


def _preactivation(
    x: Tensor,
    shortcut: Tensor | None,
    statistics: Tensor,
    gates: Tensor | None,
    a: Arguments | Saved,
) -> Tensor:
    """s ⊙ norm(x) + norm(shortcut), what the activation sees; the maps in sums' type."""
    v = x
    if statistics.shape[0] > 0:
        gain, bias = _scale_shift(statistics, a.weight, a.bias)
        v = (x - spread(statistics[0], x)) * spread(gain, x) + spread(bias, x)
    if gates is not None:
        v = v * spread(gates, x)
    if shortcut is not None:
        if a.normalize_shortcut:
            gain, bias = _scale_shift(statistics[3:], a.shortcut_weight, a.shortcut_bias)
            shortcut = (shortcut - spread(statistics[3], x)) * spread(gain, x) + spread(bias, x)
        v = v + shortcut
    return v


def forward(a: Arguments) -> Outputs:
    """y and what its backward pass needs."""
    x = dense(a.x)
    if x.numel() == 0:
        outputs = empty_outputs(a)
        for output in outputs:
            assert output is not None
            output.zero_()
        return outputs
    u = x.to(accumulator(x.dtype))
    r = None if a.shortcut is None else a.shortcut.to(u.dtype)
    with full_precision(x.device.type):
        statistics = u.new_empty((0, x.shape[1]))
        if a.normalization == "batch":
            squeezed, own = batch_statistics(u, a.eps)
            other: tuple[Tensor, ...] = ()
            if a.normalize_shortcut and r is not None:
                other = batch_statistics(r, a.shortcut_eps)[1]
            statistics = torch.stack((*own, *other))
        elif a.normalization == "running":
            own = running_statistics(a.running_mean, a.running_var, u.dtype, a.eps)
            other = ()
            if a.normalize_shortcut:
                other = running_statistics(a.shortcut_mean, a.shortcut_var, u.dtype, a.shortcut_eps)
            statistics = torch.stack((*own, *other))
        if a.normalization != "batch" and a.w1 is not None:
            squeezed = pixel_mean(u)
        hidden = gates = None
        if a.w1 is not None and a.w2 is not None:
            z = squeezed
            if statistics.shape[0]:
                gain, bias = _scale_shift(statistics, a.weight, a.bias)
                z = (squeezed - statistics[0]) * gain + bias
            hidden, gates = excite(z, a.w1, a.b1, a.w2, a.b2, a.gate)
        v = _preactivation(u, r, statistics, gates, a)
        activation = final_activation(a)
        y = stored(activate(v, activation, a.negative_slope), x.dtype)
        bare = activation == "linear" and gates is None and a.shortcut is None
        if bare and not statistics.shape[0]:
            y = y.clone()  # an operator's output must not be its input
    if gates is None or hidden is None:
        absent = u.new_empty((x.shape[0], 0))
        return Outputs(y, statistics, absent, absent.clone(), absent.clone())
    return Outputs(y, statistics, squeezed, hidden, gates)


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, and some others, from that of y."""
    x = dense(saved.x)
    dtype = accumulator(x.dtype)
    found: dict[str, Tensor] = {}
    w1, w2, statistics = saved.w1, saved.w2, saved.statistics
    squeezed, hidden = saved.squeezed, saved.hidden
    gates = None if w1 is None else saved.gates
    batch = saved.normalization == "batch"
    with full_precision(x.device.type):
        u, g = x.to(dtype), gradient.to(dtype)
        r = None if saved.shortcut is None else saved.shortcut.to(dtype)
        if saved.normalization == "none":
            identity = u.new_tensor([0.0, 1.0]).unsqueeze(1).expand(2, x.shape[1])
            mean, inv_std = identity
            a, b = inv_std, mean
        else:
            mean, inv_std = statistics[0], statistics[1]
            a, b = _scale_shift(statistics, saved.weight, saved.bias)
        activation = final_activation(saved)
        if activation != "linear":
            y = saved.y
            if y is None:
                y = _preactivation(u, r, statistics, gates, saved)
            g = through(g, y, activation, saved.negative_slope)
        dz = None
        if wanted.x or wanted.weight or wanted.bias or any(wanted[6:]):
            g1 = pixel_sum(g)
            g2 = pixel_sum(g * (u - spread(mean, u)))
            v1, v2 = g1, g2  # sums of dv and dv * (x - mean), dv the gradient of norm(x)
            if w1 is not None and w2 is not None:
                assert squeezed is not None
                assert hidden is not None
                assert gates is not None
                ds = a * g2 + b * g1
                dz, dhidden, dt = excite_backward(ds, w1, w2, hidden, gates, saved.gate)
                v1 = gates * g1 + dz
                v2 = gates * g2 + dz * (squeezed - mean)
                if wanted.w1:
                    found["w1"] = (dhidden.t() @ ((squeezed - mean) * a + b)).reshape(w1.shape)
                if wanted.w2:
                    found["w2"] = (dt.t() @ hidden).reshape(w2.shape)
                found["b1"], found["b2"] = dhidden.sum(0), dt.sum(0)
            found["bias"], found["weight"] = v1.sum(0), v2.sum(0) * inv_std
        if wanted.x:
            dv = g if gates is None else g * spread(gates, g)
            if dz is not None:
                dv = dv + spread(dz / max(x[:1, :1].numel(), 1), g)
            if batch:
                dx = map_gradient(dv, u, statistics, a, found["weight"], found["bias"])
            else:
                dx = dv * spread(a, u)
            found["x"] = dx.to(x.dtype)
        if saved.normalize_shortcut and r is not None:
            rows = statistics[3:]
            gain, _ = _scale_shift(rows, saved.shortcut_weight, saved.shortcut_bias)
            found["shortcut_bias"] = pixel_sum(g).sum(0)
            g3 = pixel_sum(g * (r - spread(rows[0], r))).sum(0)
            found["shortcut_weight"] = g3 * rows[1]
            if wanted.shortcut:
                dr = g * spread(gain, r)
                if batch:
                    parameters = (found["shortcut_weight"], found["shortcut_bias"])
                    dr = map_gradient(g, r, rows, gain, *parameters)
                found["shortcut"] = dr.to(x.dtype)
        elif wanted.shortcut:
            found["shortcut"] = g.to(x.dtype)
    return Gradients(*map(found.get, Gradients._fields))
