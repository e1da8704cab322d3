"""The closed form of the tail, forward and backward, in pure PyTorch for any device.

The tail is y = relu(s ⊙ BN(x) + shortcut). By linearity the squeeze z is BN of the per-image mean
of x, which the batch statistics need anyway, so two passes over x do; the backward pass needs two
more, and keeps no map but x and y. torch.compile turns this file into a few kernels.
docs/performance.md derives the formulas.

Shapes: N images, C channels, * spatial axes with P pixels, M = N * P, h the gate's hidden width.
`tail` and `tail_backward` have the signatures of the operators `senet::tail` and
`senet::tail_backward`; `senet.ops.cpu` has the same two in C++.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.ops.reference import accumulator, full_precision, gate_value, spread

# Indices into `wanted` and into the gradients that tail_backward returns.
GRADIENTS = (
    "x",
    "shortcut",
    "weight",
    "bias",
    "shortcut_weight",
    "shortcut_bias",
    "w1",
    "b1",
    "w2",
    "b2",
)

GATE_PARAMETERS = GRADIENTS[6:]

TailOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def memory_format(x: Tensor) -> torch.memory_format:
    """The format whose order of axes x has: channels_last where channels are adjacent."""
    if x.ndim in (4, 5) and not x.is_contiguous() and x.stride(1) == 1:
        return torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x itself when it is contiguous or channels_last, otherwise a copy that is."""
    return x.contiguous(memory_format=memory_format(x))


def empty_outputs(x: Tensor, statistics_rows: int, hidden_width: int) -> TailOutput:
    """Uninitialized y, statistics (rows,C), squeezed (N,C), hidden (N,h), gates (N,C)."""
    N, C = x.shape[0], x.shape[1]
    dtype, device = accumulator(x.dtype), x.device
    gated = C if hidden_width else 0
    return (
        torch.empty_like(x),
        torch.empty((statistics_rows, C), dtype=dtype, device=device),
        torch.empty((N, gated), dtype=dtype, device=device),
        torch.empty((N, hidden_width), dtype=dtype, device=device),
        torch.empty((N, gated), dtype=dtype, device=device),
    )


def empty_gradients(x: Tensor, hidden_width: int, wanted: list[bool]) -> list[Tensor]:
    """Uninitialized gradients, those of `GRADIENTS` that are wanted."""
    C, h, dtype = x.shape[1], hidden_width, accumulator(x.dtype)
    shapes = {"w1": (h, C), "b1": (h,), "w2": (C, h)}
    return [
        torch.empty_like(x)
        if name in ("x", "shortcut")
        else torch.empty(shapes.get(name, (C,)), dtype=dtype, device=x.device)
        for name, want in zip(GRADIENTS, wanted, strict=True)
        if want
    ]


def statistics_rows(normalization: str, normalize_shortcut: bool) -> int:
    """Rows mean, inv_std, unbiased var, for x and then for a normalized shortcut."""
    return 0 if normalization == "none" else 6 if normalize_shortcut else 3


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mean per image (N,C); mean, inv_std and unbiased var (C,) over all images.

    Sums are taken of x minus its first pixel, so that a large mean costs no digits and a constant
    channel is exact.
    """
    axes = (0, *range(2, x.ndim))
    pivot = x.detach().flatten(2)[0, :, 0]
    pivot = torch.where(pivot.isfinite(), pivot, 0)
    shifted = x - spread(pivot, x)
    squeezed = pixel_mean(shifted)
    mean = squeezed.mean(0)
    biased = (shifted - spread(mean, x)).square().mean(axes)
    count = x.numel() // x.shape[1]
    unbiased = biased * (count / max(count - 1, 1))
    return squeezed + pivot, (mean + pivot, torch.rsqrt(biased + eps), unbiased)


def running_statistics(
    mean: Tensor | None, var: Tensor | None, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, inv_std and var (C,) from the running statistics."""
    assert mean is not None
    assert var is not None
    return mean.to(dtype), torch.rsqrt(var.to(dtype) + eps), var.to(dtype)


def _scale_shift(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a = weight * inv_std and the bias of a normalization (1 and 0 where None)."""
    a = statistics[1] if weight is None else statistics[1] * weight.to(statistics.dtype)
    b = torch.zeros_like(a) if bias is None else bias.to(statistics.dtype)
    return a, b


def pixel_mean(x: Tensor) -> Tensor:
    """Mean (N,C) of x (N,C,*)."""
    return x.mean(tuple(range(2, x.ndim)))


def pixel_sum(x: Tensor) -> Tensor:
    """Sum (N,C) of x (N,C,*)."""
    return x.sum(tuple(range(2, x.ndim)))


def _preactivation(
    x: Tensor,
    shortcut: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    gates: Tensor | None,
    normalize_shortcut: bool,
) -> Tensor:
    """s ⊙ norm(x) + norm(shortcut), what the relu sees; x, shortcut in the accumulation type."""
    v = x
    if statistics.shape[0] > 0:
        a, b = _scale_shift(statistics, weight, bias)
        v = (x - spread(statistics[0], x)) * spread(a, x) + spread(b, x)
    if gates is not None:
        v = v * spread(gates, x)
    if shortcut is not None:
        if normalize_shortcut:
            a, b = _scale_shift(statistics[3:], shortcut_weight, shortcut_bias)
            shortcut = (shortcut - spread(statistics[3], x)) * spread(a, x) + spread(b, x)
        v = v + shortcut
    return v


def tail(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_var: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    normalization: str,
    normalize_shortcut: bool,
    eps: float,
    shortcut_eps: float,
    gate: str,
    relu: bool,
) -> TailOutput:
    """y = relu(s ⊙ norm(x) + norm(shortcut)) and what its backward pass needs.

    Args:
        x: (N,C,*), any floating type; sums are kept in at least float32.
        shortcut: (N,C,*) or None.
        weight, bias: (C,) or None for 1 and 0.
        running_mean, running_var: (C,), read when `normalization` is "running".
        shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var: the same for the shortcut.
        w1, b1, w2, b2: (h,C), (h,), (C,h), (C,); w1 and w2 None for no gate.
        normalization: "batch", "running" or "none".
        normalize_shortcut: whether the shortcut has a normalization of its own.
        eps, shortcut_eps: added to the variances.
        gate: one of `reference.GATES`.
        relu: whether the relu is applied.

    Returns:
        y like x; statistics (0|3|6,C): mean, inv_std, unbiased var; squeezed (N,C): mean of x per
        image; hidden (N,h); gates (N,C). The last three are empty without a gate.
    """
    x = dense(x)
    if x.numel() == 0:
        outputs = empty_outputs(
            x, statistics_rows(normalization, normalize_shortcut), 0 if w1 is None else w1.shape[0]
        )
        for output in outputs:
            output.zero_()
        return outputs
    u = x.to(accumulator(x.dtype))
    r = None if shortcut is None else shortcut.to(u.dtype)
    with full_precision(x.device.type):
        statistics = u.new_empty((0, x.shape[1]))
        if normalization == "batch":
            squeezed, own = batch_statistics(u, eps)
            other: tuple[Tensor, ...] = ()
            if normalize_shortcut and r is not None:
                other = batch_statistics(r, shortcut_eps)[1]
            statistics = torch.stack((*own, *other))
        elif normalization == "running":
            own = running_statistics(running_mean, running_var, u.dtype, eps)
            other = ()
            if normalize_shortcut:
                other = running_statistics(shortcut_mean, shortcut_var, u.dtype, shortcut_eps)
            statistics = torch.stack((*own, *other))
        if normalization != "batch" and w1 is not None:
            squeezed = pixel_mean(u)
        hidden = gates = None
        if w1 is not None and w2 is not None:
            z = squeezed
            if statistics.shape[0]:
                a, b = _scale_shift(statistics, weight, bias)
                z = (squeezed - statistics[0]) * a + b
            hidden, gates = excite(z, w1, b1, w2, b2, gate)
        norms = (weight, bias, shortcut_weight, shortcut_bias)
        v = _preactivation(u, r, statistics, *norms, gates, normalize_shortcut)
        y = (F.relu(v) if relu else v).to(x.dtype)
        if not (relu or statistics.shape[0] or gates is not None or shortcut is not None):
            y = y.clone()  # an operator's output must not be its input
    absent = u.new_empty((x.shape[0], 0))
    if gates is None or hidden is None:
        return y, statistics, absent, absent.clone(), absent.clone()
    return y, statistics, squeezed, hidden, gates


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """t, if there is one, with another dtype."""
    return None if t is None else t.to(dtype)


def gate_slope(s: Tensor, gate: str) -> Tensor:
    """The gate's derivative, from its value s."""
    match gate:
        case "sigmoid":
            return s * (1 - s)
        case "tanh":
            return 1 - s * s
        case "relu":
            return (s > 0).to(s.dtype)
        case "hard_sigmoid":
            return ((s > 0) & (s < 1)).to(s.dtype) / 6
        case _:
            return s * (1 - s / 2)


def excite(
    z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    """Hidden (N,h) and gates (N,C) of a squeeze z (N,C)."""
    hidden = F.relu(F.linear(z, w1.flatten(1).to(z.dtype), cast(b1, z.dtype)))
    t = F.linear(hidden, w2.flatten(1).to(z.dtype), cast(b2, z.dtype))
    return hidden, gate_value(t, gate)


def excite_backward(
    ds: Tensor, w1: Tensor, w2: Tensor, hidden: Tensor, gates: Tensor, gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z (N,C) and of what the relu (N,h) and the gate (N,C) see, from the gates'."""
    dt = ds * gate_slope(gates, gate)
    dhidden = torch.where(hidden <= 0, 0, dt @ w2.flatten(1).to(dt.dtype))
    return dhidden @ w1.flatten(1).to(dt.dtype), dhidden, dt


def map_gradient(
    g: Tensor, x: Tensor, statistics: Tensor, scale: Tensor, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dx of a batch normalization with gain `scale` = weight * inv_std, from the gradient g.

    dweight and dbias (C,) are those of its parameters.
    """
    count = x.numel() // x.shape[1]
    centred = x - spread(statistics[0], x)
    slope = -scale * statistics[1] * dweight / count
    return spread(scale, x) * g + spread(slope, x) * centred - spread(scale * dbias / count, x)


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
    squeezed: Tensor,
    hidden: Tensor,
    gates: Tensor,
    normalization: str,
    normalize_shortcut: bool,
    gate: str,
    relu: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The `wanted` gradients, in the order of `GRADIENTS`.

    Args:
        gradient: (N,C,*) of y.
        y: the output, where the relu's mask comes from if there is a plain shortcut; otherwise the
            mask is recomputed from x (and a normalized shortcut) and y may be None.
        shortcut: needed only when normalized.
        wanted: one flag for each of `GRADIENTS`.
        others: as given to and returned by `tail`.
    """
    x = dense(x)
    dtype = accumulator(x.dtype)
    want = dict(zip(GRADIENTS, wanted, strict=True))
    found: dict[str, Tensor] = {}
    gated, batch = w1 is not None, normalization == "batch"
    with full_precision(x.device.type):
        u, g = x.to(dtype), gradient.to(dtype)
        r = None if shortcut is None else shortcut.to(dtype)
        s = gates if gated else None
        if normalization == "none":
            identity = u.new_tensor([0.0, 1.0]).unsqueeze(1).expand(2, x.shape[1])
            mean, inv_std = identity
            a, b = inv_std, mean
        else:
            mean, inv_std = statistics[0], statistics[1]
            a, b = _scale_shift(statistics, weight, bias)
        if relu:
            if y is None:
                norms = (weight, bias, shortcut_weight, shortcut_bias)
                y = _preactivation(u, r, statistics, *norms, s, normalize_shortcut)
            g = torch.where(y <= 0, 0, g)
        branch = want["x"] or any(want[name] for name in ("weight", "bias", *GATE_PARAMETERS))
        dz = None
        if branch:
            g1 = pixel_sum(g)
            g2 = pixel_sum(g * (u - spread(mean, u)))
            v1, v2 = g1, g2  # sums of dv and dv * (x - mean), dv the gradient of norm(x)
            if w1 is not None and w2 is not None:
                ds = a * g2 + b * g1
                dz, dhidden, dt = excite_backward(ds, w1, w2, hidden, gates, gate)
                v1 = gates * g1 + dz
                v2 = gates * g2 + dz * (squeezed - mean)
                if want["w1"]:
                    found["w1"] = dhidden.t() @ ((squeezed - mean) * a + b)
                if want["w2"]:
                    found["w2"] = dt.t() @ hidden
                found["b1"], found["b2"] = dhidden.sum(0), dt.sum(0)
            found["bias"], found["weight"] = v1.sum(0), v2.sum(0) * inv_std
        if want["x"]:
            dv = g if s is None else g * spread(s, g)
            if dz is not None:
                dv = dv + spread(dz / max(x[:1, :1].numel(), 1), g)
            if batch:
                dx = map_gradient(dv, u, statistics, a, found["weight"], found["bias"])
            else:
                dx = dv * spread(a, u)
            found["x"] = dx.to(x.dtype)
        if normalize_shortcut and r is not None:
            rows = statistics[3:]
            gain, _ = _scale_shift(rows, shortcut_weight, shortcut_bias)
            found["shortcut_bias"] = pixel_sum(g).sum(0)
            g3 = pixel_sum(g * (r - spread(rows[0], r))).sum(0)
            found["shortcut_weight"] = g3 * rows[1]
            if want["shortcut"]:
                dr = g * spread(gain, r)
                if batch:
                    parameters = (found["shortcut_weight"], found["shortcut_bias"])
                    dr = map_gradient(g, r, rows, gain, *parameters)
                found["shortcut"] = dr.to(x.dtype)
        elif want["shortcut"]:
            found["shortcut"] = g.to(x.dtype)
    return [found[name] for name in GRADIENTS if want[name]]
