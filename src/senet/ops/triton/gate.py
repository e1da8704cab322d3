"""Everything of (N,C) size as Triton kernels: merged sums, the gate, and its gradients.

Products are `tl.dot` with exact float32 ("ieee"): neither TF32 nor PyTorch's switch for it touches
the gate. Each program owns what it writes and loops over what it sums.
"""

# No `from __future__ import annotations`: Triton reads the annotation of a constexpr.

import triton
import triton.language as tl

from senet.ops.triton.activation import activate, derivative, sigmoid, through
from senet.ops.triton.kernels import affine


@triton.jit
def merge_kernel(
    parts, out, rows, splits, chunk, C, P,
    MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (rows,C) from parts (rows * splits,C): sums, or means over an image from chunks'."""
    tiles = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    for split in range(splits):
        at = (row.to(tl.int64)[:, None] * splits + split) * C + channel[None, :]
        value = tl.load(parts + at, inside, other=0).to(tl.float64)
        if MEAN:
            value *= tl.minimum(P - split * chunk, chunk)
        total += value
    if MEAN:
        total /= P
    target = row.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + target, total.to(ACC), inside)


@triton.jit
def gate_function(t, GATE: tl.constexpr):
    """sigma of eq. 3, one of `senet.ops.GATES`."""
    if GATE == "sigmoid":
        return sigmoid(t)
    if GATE == "tanh":
        return 2 * sigmoid(2 * t) - 1
    if GATE == "relu":
        return tl.where(t <= 0, 0, t)
    if GATE == "hard_sigmoid":
        t += 3
        return tl.where(t <= 0, 0, tl.where(t >= 6, 6, t)) / 6
    return 2 * sigmoid(t)


@triton.jit
def gate_slope(s, GATE: tl.constexpr):
    """The gate's derivative, from its value."""
    if GATE == "sigmoid":
        return s * (1 - s)
    if GATE == "tanh":
        return 1 - s * s
    if GATE == "relu":
        return tl.where(s > 0, 1, 0).to(s.dtype)
    if GATE == "hard_sigmoid":
        return tl.where((s > 0) & (s < 1), 1, 0).to(s.dtype) / 6
    return s * (1 - s / 2)


@triton.jit
def squeezed_tile(
    squeezed, statistics, weight, bias, n, c, N, C, NORMALIZED: tl.constexpr, ACC: tl.constexpr
):
    """z, the mean of norm(x) over the pixels of an image, as a tile (BLOCK_N,BLOCK_C)."""
    mean, gain, offset = affine(statistics, 0, weight, bias, c, c < C, C, NORMALIZED, ACC)
    inside = (n < N)[:, None] & (c < C)[None, :]
    m = tl.load(squeezed + n.to(tl.int64)[:, None] * C + c[None, :], inside, other=0)
    return tl.where(inside, (m - mean[None, :]) * gain[None, :] + offset[None, :], 0)


@triton.jit
def hidden_kernel(
    squeezed, statistics, weight, bias, w1, b1, hidden, N, C, H,
    NORMALIZED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """hidden (N,H) = z W1ᵀ + b1, with HIDDEN "relu" that of it."""
    tiles = tl.cdiv(H, BLOCK_H)
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = (tl.program_id(0) % tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_N, BLOCK_H], ACC)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        z = squeezed_tile(squeezed, statistics, weight, bias, n, c, N, C, NORMALIZED, ACC)
        inside = (c < C)[:, None] & (h < H)[None, :]
        w = tl.load(w1 + h.to(tl.int64)[None, :] * C + c[:, None], inside, other=0)
        total += tl.dot(z, w, input_precision="ieee", out_dtype=ACC)
    if b1 is not None:
        total += tl.load(b1 + h, h < H, other=0)[None, :]
    if HIDDEN == "relu":
        total = tl.where(total <= 0, 0, total)
    inside = (n < N)[:, None] & (h < H)[None, :]
    tl.store(hidden + n.to(tl.int64)[:, None] * H + h[None, :], total, inside)


@triton.jit
def gates_kernel(
    hidden, w2, b2, gates, N, C, H, GATE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """gates (N,C) = gate(δ(hidden) W2ᵀ + b2), δ named by HIDDEN."""
    tiles = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        inside = (n < N)[:, None] & (h < H)[None, :]
        value = tl.load(hidden + n.to(tl.int64)[:, None] * H + h[None, :], inside, other=0)
        value = activate(value, HIDDEN, 0.0)
        inside = (h < H)[:, None] & (c < C)[None, :]
        w = tl.load(w2 + c.to(tl.int64)[None, :] * H + h[:, None], inside, other=0)
        total += tl.dot(value, w, input_precision="ieee", out_dtype=ACC)
    if b2 is not None:
        total += tl.load(b2 + c, c < C, other=0)[None, :]
    inside = (n < N)[:, None] & (c < C)[None, :]
    target = gates + n.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(target, gate_function(total, GATE), inside)


@triton.jit
def gate_gradient_tile(
    sums, gates, statistics, weight, bias, n, c, N, C,
    NORMALIZED: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the gate's argument, (gain Σ g'(x - mean) + bias Σ g') times its slope.

    Σ g' is read where there is a bias only.
    """
    _, gain, offset = affine(statistics, 0, weight, bias, c, c < C, C, NORMALIZED, ACC)
    inside = (n < N)[:, None] & (c < C)[None, :]
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    ds = gain[None, :] * tl.load(sums + tl.cast(N, tl.int64) * C + at, inside, other=0)
    if bias is not None:
        ds += offset[None, :] * tl.load(sums + at, inside, other=0)
    s = tl.load(gates + at, inside, other=0)
    return tl.where(inside, ds * gate_slope(s, GATE), 0)


@triton.jit
def hidden_gradient_kernel(
    sums, gates, hidden, statistics, weight, bias, w2, dhidden, N, C, H,
    NORMALIZED: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """dhidden (N,H), of what δ sees; sums (2,N,C) of `sums_kernel` merged over an image."""
    tiles = tl.cdiv(H, BLOCK_H)
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = (tl.program_id(0) % tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_N, BLOCK_H], ACC)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        dt = gate_gradient_tile(
            sums, gates, statistics, weight, bias, n, c, N, C, NORMALIZED, GATE, ACC
        )
        inside = (c < C)[:, None] & (h < H)[None, :]
        w = tl.load(w2 + c.to(tl.int64)[:, None] * H + h[None, :], inside, other=0)
        total += tl.dot(dt, w, input_precision="ieee", out_dtype=ACC)
    inside = (n < N)[:, None] & (h < H)[None, :]
    at = n.to(tl.int64)[:, None] * H + h[None, :]
    value = tl.load(hidden + at, inside, other=0)
    slope = derivative(value, HIDDEN, 0.0)
    tl.store(dhidden + at, through(total, slope, HIDDEN), inside)


@triton.jit
def squeeze_gradient_kernel(
    dhidden, w1, dz, N, C, H, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz (N,C) = dhidden W1."""
    tiles = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        inside = (n < N)[:, None] & (h < H)[None, :]
        value = tl.load(dhidden + n.to(tl.int64)[:, None] * H + h[None, :], inside, other=0)
        inside = (h < H)[:, None] & (c < C)[None, :]
        w = tl.load(w1 + h.to(tl.int64)[:, None] * C + c[None, :], inside, other=0)
        total += tl.dot(value, w, input_precision="ieee", out_dtype=ACC)
    inside = (n < N)[:, None] & (c < C)[None, :]
    tl.store(dz + n.to(tl.int64)[:, None] * C + c[None, :], total, inside)


@triton.jit
def weight_gradients_kernel(
    sums, gates, hidden, dhidden, squeezed, statistics, weight, bias, dw1, db1, dw2, db2, N, C, H,
    NORMALIZED: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """dw1 (H,C), db1 (H,), dw2 (C,H) and db2 (C,), each if its pointer is; sums over images."""
    tiles = tl.cdiv(C, BLOCK_C)
    first_c = tl.program_id(0) % tiles
    first_h = tl.program_id(0) // tiles
    c = first_c * BLOCK_C + tl.arange(0, BLOCK_C)
    h = first_h * BLOCK_H + tl.arange(0, BLOCK_H)
    total1 = tl.zeros([BLOCK_H, BLOCK_C], ACC)
    total2 = tl.zeros([BLOCK_C, BLOCK_H], ACC)
    bias1 = tl.zeros([BLOCK_H], tl.float64)
    bias2 = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (h < H)[None, :]
        at = n.to(tl.int64)[:, None] * H + h[None, :]
        dh = tl.load(dhidden + at, inside, other=0)
        dt = gate_gradient_tile(
            sums, gates, statistics, weight, bias, n, c, N, C, NORMALIZED, GATE, ACC
        )
        if dw1 is not None:
            z = squeezed_tile(squeezed, statistics, weight, bias, n, c, N, C, NORMALIZED, ACC)
            total1 += tl.dot(tl.trans(dh), z, input_precision="ieee", out_dtype=ACC)
        if dw2 is not None:
            value = tl.load(hidden + at, inside, other=0)
            value = activate(value, HIDDEN, 0.0)
            total2 += tl.dot(tl.trans(dt), value, input_precision="ieee", out_dtype=ACC)
        bias1 += tl.sum(dh.to(tl.float64), 0)
        bias2 += tl.sum(dt.to(tl.float64), 0)
    if dw1 is not None:
        inside = (h < H)[:, None] & (c < C)[None, :]
        tl.store(dw1 + h.to(tl.int64)[:, None] * C + c[None, :], total1, inside)
    if dw2 is not None:
        inside = (c < C)[:, None] & (h < H)[None, :]
        tl.store(dw2 + c.to(tl.int64)[:, None] * H + h[None, :], total2, inside)
    if db1 is not None:
        tl.store(db1 + h, bias1.to(ACC), (h < H) & (first_c == 0))
    if db2 is not None:
        tl.store(db2 + c, bias2.to(ACC), (c < C) & (first_h == 0))


@triton.jit
def channel_gradients_kernel(
    sums, gates, dz, squeezed, statistics, dweight, dbias, s_dweight, s_dbias, N, C,
    NORMALIZED: tl.constexpr, OTHER: tl.constexpr, BRANCH: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of both normalizations' parameters (C,): sums over the images, in float64."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    kept = c < C
    mean, inv_std, _ = affine(statistics, 0, None, None, c, kept, C, NORMALIZED, ACC)
    size = tl.cast(N, tl.int64) * C
    plain = tl.zeros([BLOCK_C], tl.float64)
    first_order = tl.zeros([BLOCK_C], tl.float64)
    second_order = tl.zeros([BLOCK_C], tl.float64)
    other = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & kept[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        g1 = tl.load(sums + at, inside, other=0)
        plain += tl.sum(g1.to(tl.float64), 0)
        if BRANCH:
            v1 = g1
            v2 = tl.load(sums + size + at, inside, other=0)
            if gates is not None:
                s = tl.load(gates + at, inside, other=0)
                d = tl.load(dz + at, inside, other=0)
                m = tl.load(squeezed + at, inside, other=0)
                v1 = s * v1 + d
                v2 = tl.where(inside, s * v2 + d * (m - mean[None, :]), 0)
            first_order += tl.sum(v1.to(tl.float64), 0)
            second_order += tl.sum(v2.to(tl.float64), 0)
        if OTHER:
            other += tl.sum(tl.load(sums + 2 * size + at, inside, other=0).to(tl.float64), 0)
    if BRANCH:
        tl.store(dbias + c, first_order.to(ACC), kept)
        tl.store(dweight + c, (second_order * inv_std).to(ACC), kept)
    if OTHER:
        s_inv_std = tl.load(statistics + tl.cast(C, tl.int64) * 4 + c, kept, other=0)
        tl.store(s_dbias + c, plain.to(ACC), kept)
        tl.store(s_dweight + c, (other * s_inv_std).to(ACC), kept)


@triton.jit
def branch_channels_kernel(
    sums, rows, gates, dz, dweight, dbias, per_channel, N, C, P, M,
    BATCH: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What a join's branch sums over its images, in float64.

    The gradients of its normalization's parameters (C,), each if its pointer is, and the terms of
    dx that are the same for all images: per_channel (2,C), see `branch_gradient_kernel`.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    kept = c < C
    inv_std = tl.load(rows + C + c, kept, other=0).to(tl.float64)
    scale = tl.load(rows + tl.cast(C, tl.int64) * 3 + c, kept, other=0).to(tl.float64)
    size = tl.cast(N, tl.int64) * C
    plain = tl.zeros([BLOCK_C], tl.float64)
    moment = tl.zeros([BLOCK_C], tl.float64)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & kept[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        a1 = tl.load(sums + at, inside, other=0).to(tl.float64)
        a2 = tl.load(sums + size + at, inside, other=0).to(tl.float64)
        if gates is not None:
            s = tl.load(gates + at, inside, other=0).to(tl.float64)
            d = tl.load(dz + at, inside, other=0).to(tl.float64) / P
            a1 = s * a1 + d * tl.load(sums + 2 * size + at, inside, other=0).to(tl.float64)
            a2 = s * a2 + d * tl.load(sums + 3 * size + at, inside, other=0).to(tl.float64)
        plain += tl.sum(a1, 0)
        moment += tl.sum(a2, 0)
    moment *= inv_std
    if dbias is not None:
        tl.store(dbias + c, plain.to(ACC), kept)
    if dweight is not None:
        tl.store(dweight + c, moment.to(ACC), kept)
    pull = tl.zeros([BLOCK_C], tl.float64)
    constant = pull
    if BATCH:
        pull = scale * inv_std * moment / -M
        constant = scale * plain / -M
    tl.store(per_channel + c, pull.to(ACC), kept)
    tl.store(per_channel + C + c, constant.to(ACC), kept)
