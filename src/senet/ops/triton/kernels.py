"""The passes over maps as Triton kernels: moments, the tail, a join's branch, their gradients.

`senet.ops.triton.tail` and `join` launch them; `senet.ops.triton.gate` has those of (N,C) size. No
kernel adds into memory that another program writes: every program stores partial sums of its own,
which a second kernel merges in a fixed order.

Layout: a map is (N,P,C) in memory where CHANNELS_LAST, else (N,C,P). A program has a tile of
BLOCK_P pixels and BLOCK_C channels of an image. ACC is the type of sums. WIDE: offsets inside a
tile need 64 bits; those of its start always have them.
"""

# No `from __future__ import annotations`: Triton reads the annotation of a constexpr.
# Triton's arguments are its own: N, C, P are sizes, capitals otherwise compile-time constants.

import triton
import triton.language as tl

from senet.ops.triton.activation import activate, derivative, through


@triton.jit
def locate(
    pid, C, P, splits, tiles,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Image, first channel, first pixel and row (image * splits + split) of a program."""
    channel_tiles = tl.cdiv(C, BLOCK_C)
    row = pid // channel_tiles
    first_channel = (pid % channel_tiles) * BLOCK_C
    return row // splits, first_channel, (row % splits) * tiles * BLOCK_P, row


@triton.jit
def place(
    n, first_channel, first_pixel, C, P,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Offset of a tile's start (64 bits), of its elements from there, and which of them exist."""
    pixel = tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (first_pixel + pixel < P) & (first_channel + channel < C)
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    start = tl.cast(n, tl.int64) * C * P
    if CHANNELS_LAST:
        start += tl.cast(first_pixel, tl.int64) * C + first_channel
        return start, pixel * C + channel, inside
    start += tl.cast(first_channel, tl.int64) * P + first_pixel
    return start, channel * P + pixel, inside


@triton.jit
def affine(
    statistics, first_row, weight, bias, channel, inside, C,
    NORMALIZED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean, gain and bias of a normalization, (BLOCK_C,): norm(x) = (x - mean) * gain + bias.

    Without NORMALIZED only the weight and the bias that are given.
    """
    mean = tl.zeros_like(channel).to(ACC)
    gain = mean + 1
    offset = mean
    if NORMALIZED:
        row = statistics + tl.cast(first_row, tl.int64) * C
        mean = tl.load(row + channel, inside, other=0)
        gain = tl.load(row + C + channel, inside, other=0)
    if weight is not None:
        gain *= tl.load(weight + channel, inside, other=0)
    if bias is not None:
        offset = tl.load(bias + channel, inside, other=0)
    return mean, gain, offset


@triton.jit
def pivot_step(values, inside, pivot, count, BLOCK_P: tl.constexpr):
    """Pivot plus the mean of the first tile's distances from it; 0 where that is not finite."""
    # Divided before the sum, which else leaves the range of float32 at 3e38.
    part = tl.sum(tl.where(inside, values - pivot[None, :], 0) * (1 / BLOCK_P), 0)
    found = pivot + part * (BLOCK_P / count)
    return tl.where(found - found == 0, found, 0)


@triton.jit
def moments_kernel(
    x, means, deviations, C, P, splits, tiles,
    SECOND: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over `tiles` tiles of an image.

    Sums are taken about a pivot, the mean of the first tile. It is off the mean by at most
    sqrt(tiles) deviations, so the cancellation in the second moment costs a relative error of
    `tiles` roundings at most, whatever the mean (Cauchy and Schwarz).
    """
    n, first_channel, first, row = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    count = tl.minimum(P - first, tiles * BLOCK_P)
    start, offsets, inside = place(
        n, first_channel, first, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    values = tl.load(x + start + offsets, inside, other=0).to(ACC)
    seen = tl.minimum(count, BLOCK_P)
    pivot = pivot_step(values, inside, tl.zeros([BLOCK_C], ACC), seen, BLOCK_P)
    # The second step takes the rounding of the first: the pivot of a constant is that constant.
    pivot = pivot_step(values, inside, pivot, seen, BLOCK_P)

    sums = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        values = tl.load(x + start + offsets, inside, other=0).to(ACC)
        distance = tl.where(inside, values - pivot[None, :], 0)
        sums += distance
        if SECOND:
            squares += distance * distance
    total = tl.sum(sums, 0)
    mean = total / count
    kept = channel < C
    target = tl.cast(row, tl.int64) * C + channel
    tl.store(means + target, pivot + mean, kept)
    if SECOND:
        deviation = tl.sum(squares, 0) - total * mean
        deviation = tl.where(deviation < 0, 0, deviation)  # a NaN stays
        tl.store(deviations + target, deviation, kept)


@triton.jit
def statistics_kernel(
    means, deviations, running_mean, running_var, statistics, weight, bias,
    rows, splits, chunk, C, P, M, momentum,
    first_row: tl.constexpr, EPS: tl.constexpr, BATCH: tl.constexpr, MOVE: tl.constexpr,
    AFFINE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows mean, inv_std and variance of a normalization; moves running statistics if MOVE.

    If AFFINE also scale = weight * inv_std and shift = bias, which are 1 and 0 where None. The
    partial moments are merged by Chan's formula in float64.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    if BATCH:
        part = tl.arange(0, BLOCK_R)
        sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
        for first in range(0, rows, BLOCK_R):
            row = first + part
            count = tl.minimum(P - (row % splits) * chunk, chunk)
            at = row.to(tl.int64)[:, None] * C + channel[None, :]
            mask = (row < rows)[:, None] & inside[None, :]
            sums += tl.load(means + at, mask, other=0).to(tl.float64) * count[:, None]
        mean = tl.sum(sums, 0) / M
        squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
        for first in range(0, rows, BLOCK_R):
            row = first + part
            count = tl.minimum(P - (row % splits) * chunk, chunk)
            at = row.to(tl.int64)[:, None] * C + channel[None, :]
            mask = (row < rows)[:, None] & inside[None, :]
            distance = tl.load(means + at, mask, other=0).to(tl.float64) - mean[None, :]
            inner = tl.load(deviations + at, mask, other=0).to(tl.float64)
            squares += tl.where(mask, inner + distance * distance * count[:, None], 0)
        total = tl.sum(squares, 0)
        biased = total / M
        unbiased = total / tl.maximum(M - 1, 1)
        if MOVE:
            old = tl.load(running_mean + channel, inside, other=0)
            tl.store(running_mean + channel, old + (mean.to(ACC) - old) * momentum, inside)
            old = tl.load(running_var + channel, inside, other=0)
            tl.store(running_var + channel, old + (unbiased.to(ACC) - old) * momentum, inside)
    else:
        mean = tl.load(running_mean + channel, inside, other=0).to(tl.float64)
        biased = tl.load(running_var + channel, inside, other=1).to(tl.float64)
        unbiased = biased
    eps = tl.full([BLOCK_C], EPS, tl.float64)
    target = statistics + tl.cast(first_row, tl.int64) * C + channel
    inv_std = (1 / tl.sqrt(biased + eps)).to(ACC)
    tl.store(target, mean.to(ACC), inside)
    tl.store(target + C, inv_std, inside)
    tl.store(target + 2 * C, unbiased.to(ACC), inside)
    if AFFINE:
        shift = tl.zeros([BLOCK_C], ACC)
        if weight is not None:
            inv_std *= tl.load(weight + channel, inside, other=0)
        if bias is not None:
            shift = tl.load(bias + channel, inside, other=0)
        tl.store(target + 3 * C, inv_std, inside)
        tl.store(target + 4 * C, shift, inside)


@triton.jit
def preactivation(x, shortcut, mean, slope, offset, s_mean, s_gain, s_bias, OTHER: tl.constexpr):
    """s ⊙ norm(x) + norm(shortcut) of a tile; fma by name, so that every kernel rounds alike."""
    v = tl.fma(x - mean[None, :], slope[None, :], offset[None, :])
    if OTHER:
        return v + tl.fma(shortcut - s_mean[None, :], s_gain[None, :], s_bias[None, :])
    if shortcut is not None:
        return v + shortcut
    return v


@triton.jit
def tail_kernel(
    x, shortcut, y, statistics, weight, bias, s_weight, s_bias, gates, C, P, splits, tiles,
    NORMALIZED: tl.constexpr, OTHER: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(s ⊙ norm(x) + norm(shortcut))."""
    n, first_channel, first, _ = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    kept = channel < C
    mean, slope, offset = affine(statistics, 0, weight, bias, channel, kept, C, NORMALIZED, ACC)
    s_mean, s_gain, s_offset = affine(statistics, 3, s_weight, s_bias, channel, kept, C, OTHER, ACC)
    if gates is not None:
        s = tl.load(gates + tl.cast(n, tl.int64) * C + channel, kept, other=0)
        slope *= s
        offset *= s
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        u = tl.load(x + start + offsets, inside, other=0).to(ACC)
        r = None
        if shortcut is not None:
            r = tl.load(shortcut + start + offsets, inside, other=0).to(ACC)
        v = preactivation(u, r, mean, slope, offset, s_mean, s_gain, s_offset, OTHER)
        v = activate(v, ACTIVATION, SLOPE)
        tl.store(y + start + offsets, v.to(y.dtype.element_ty), inside)


@triton.jit
def masked(
    g, x, y, shortcut, at, inside, mean, slope, offset, s_mean, s_gain, s_bias,
    MASK: tl.constexpr, OTHER: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient behind the activation. MASK: "none", from a relu's "y", or "again"."""
    if MASK == "y":
        return tl.where(tl.load(y + at, inside, other=0).to(ACC) <= 0, 0, g)
    if MASK == "again":
        u = tl.load(x + at, inside, other=0).to(ACC)
        r = None
        if shortcut is not None:
            r = tl.load(shortcut + at, inside, other=0).to(ACC)
        v = preactivation(u, r, mean, slope, offset, s_mean, s_gain, s_bias, OTHER)
        return through(g, derivative(v, ACTIVATION, SLOPE), ACTIVATION)
    return g


@triton.jit
def sums_kernel(
    gradient, x, y, shortcut, out, sums, statistics, weight, bias, s_weight, s_bias, gates,
    C, P, rows, splits, tiles,
    NORMALIZED: tl.constexpr, OTHER: tl.constexpr, MASK: tl.constexpr, BRANCH: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """First pass of the gradient: g' behind the activation, and its sums over `tiles` tiles.

    sums (3,rows,C): Σ g', Σ g' (x - mean) if BRANCH, Σ g' (shortcut - its mean) if OTHER.
    g' itself goes to `out`, the gradient of a plain shortcut.
    """
    n, first_channel, first, row = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    kept = channel < C
    mean, slope, offset = affine(statistics, 0, weight, bias, channel, kept, C, NORMALIZED, ACC)
    s_mean, s_gain, s_offset = affine(statistics, 3, s_weight, s_bias, channel, kept, C, OTHER, ACC)
    if gates is not None:
        s = tl.load(gates + tl.cast(n, tl.int64) * C + channel, kept, other=0)
        slope *= s
        offset *= s
    g0 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    g1 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    g2 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        at = start + offsets
        g = tl.load(gradient + at, inside, other=0).to(ACC)
        g = masked(
            g, x, y, shortcut, at, inside, mean, slope, offset, s_mean, s_gain, s_offset,
            MASK, OTHER, ACTIVATION, SLOPE, ACC,
        )  # fmt: skip
        if out is not None:
            tl.store(out + at, g.to(out.dtype.element_ty), inside)
        g0 += g
        if BRANCH:
            u = tl.load(x + at, inside, other=0).to(ACC)
            g1 += tl.where(inside, g * (u - mean[None, :]), 0)
        if OTHER:
            r = tl.load(shortcut + at, inside, other=0).to(ACC)
            g2 += tl.where(inside, g * (r - s_mean[None, :]), 0)
    size = tl.cast(rows, tl.int64) * C
    target = sums + tl.cast(row, tl.int64) * C + channel
    tl.store(target, tl.sum(g0, 0), kept)
    if BRANCH:
        tl.store(target + size, tl.sum(g1, 0), kept)
    if OTHER:
        tl.store(target + 2 * size, tl.sum(g2, 0), kept)


@triton.jit
def map_gradients_kernel(
    gradient, x, y, shortcut, dx, dshortcut, statistics, weight, bias, s_weight, s_bias, gates, dz,
    dweight, dbias, s_dweight, s_dbias, C, P, M, splits, tiles,
    NORMALIZED: tl.constexpr, BATCH: tl.constexpr, OTHER: tl.constexpr, MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Second pass of the gradient: dx, and that of a normalized shortcut, each if its pointer is.

    dx = gain s g' - (gain inv_std dweight / M) (x - mean) + gain (dz / P - dbias / M).
    """
    n, first_channel, first, _ = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    kept = channel < C
    mean, gain, offset = affine(statistics, 0, weight, bias, channel, kept, C, NORMALIZED, ACC)
    s_mean, s_gain, s_offset = affine(statistics, 3, s_weight, s_bias, channel, kept, C, OTHER, ACC)
    slope = gain
    constant = tl.zeros([BLOCK_C], ACC)
    if gates is not None:
        s = tl.load(gates + tl.cast(n, tl.int64) * C + channel, kept, other=0)
        slope = gain * s
        offset *= s
    if dz is not None:
        constant = tl.load(dz + tl.cast(n, tl.int64) * C + channel, kept, other=0) / P
    pull = tl.zeros([BLOCK_C], ACC)
    s_pull = pull
    s_constant = pull
    if BATCH and dx is not None:
        inv_std = tl.load(statistics + C + channel, kept, other=0)
        pull = -gain * inv_std * (tl.load(dweight + channel, kept, other=0) / M)
        constant -= tl.load(dbias + channel, kept, other=0) / M
    if BATCH and OTHER:
        inv_std = tl.load(statistics + tl.cast(C, tl.int64) * 4 + channel, kept, other=0)
        s_pull = -s_gain * inv_std * (tl.load(s_dweight + channel, kept, other=0) / M)
        s_constant = -s_gain * (tl.load(s_dbias + channel, kept, other=0) / M)
    constant *= gain
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        at = start + offsets
        g = tl.load(gradient + at, inside, other=0).to(ACC)
        g = masked(
            g, x, y, shortcut, at, inside, mean, slope, offset, s_mean, s_gain, s_offset,
            MASK, OTHER, ACTIVATION, SLOPE, ACC,
        )  # fmt: skip
        if dx is not None:
            d = tl.fma(g, slope[None, :], constant[None, :])
            if BATCH:
                u = tl.load(x + at, inside, other=0).to(ACC)
                d = tl.fma(u - mean[None, :], pull[None, :], d)
            tl.store(dx + at, d.to(dx.dtype.element_ty), inside)
        if dshortcut is not None:
            d = tl.fma(g, s_gain[None, :], s_constant[None, :])
            if BATCH:
                r = tl.load(shortcut + at, inside, other=0).to(ACC)
                d = tl.fma(r - s_mean[None, :], s_pull[None, :], d)
            tl.store(dshortcut + at, d.to(dshortcut.dtype.element_ty), inside)


@triton.jit
def branch_rows(rows, channel, inside, C):
    """mean, scale and shift (BLOCK_C,) of a join's branch from its statistics."""
    row = rows + channel
    size = tl.cast(C, tl.int64)
    return (
        tl.load(row, inside, other=0),
        tl.load(row + size * 3, inside, other=0),
        tl.load(row + size * 4, inside, other=0),
    )


@triton.jit
def branch_squeeze_kernel(
    x, parts, rows, C, P, splits, tiles,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Means of act(norm(x)) over `tiles` tiles of an image."""
    n, first_channel, first, row = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    kept = channel < C
    mean, scale, shift = branch_rows(rows, channel, kept, C)
    total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        u = tl.load(x + start + offsets, inside, other=0).to(ACC)
        u = tl.fma(u - mean[None, :], scale[None, :], shift[None, :])
        total += tl.where(inside, activate(u, ACTIVATION, SLOPE), 0)
    mean = tl.sum(total, 0) / tl.minimum(P - first, tiles * BLOCK_P)
    tl.store(parts + tl.cast(row, tl.int64) * C + channel, mean, kept)


@triton.jit
def branch_kernel(
    x, y, rows, gates, C, P, splits, tiles,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = gates ⊙ act(norm(x))."""
    n, first_channel, first, _ = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    kept = channel < C
    mean, scale, shift = branch_rows(rows, channel, kept, C)
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        u = tl.load(x + start + offsets, inside, other=0).to(ACC)
        v = activate(tl.fma(u - mean[None, :], scale[None, :], shift[None, :]), ACTIVATION, SLOPE)
        if gates is not None:
            v *= tl.load(gates + tl.cast(n, tl.int64) * C + channel, kept, other=0)[None, :]
        tl.store(y + start + offsets, v.to(y.dtype.element_ty), inside)


@triton.jit
def branch_sums_kernel(
    gradient, x, sums, rows, C, P, count, splits, tiles,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, GATED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums (2|5,count,C) over `tiles` tiles: m g, m g (x - mean); m, m (x - mean), g act(u).

    u = norm(x), m the activation's derivative there. The last three if GATED.
    """
    n, first_channel, first, row = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    kept = channel < C
    mean, scale, shift = branch_rows(rows, channel, kept, C)
    sum0 = tl.zeros([BLOCK_C], ACC)
    sum1 = tl.zeros([BLOCK_C], ACC)
    sum2 = tl.zeros([BLOCK_C], ACC)
    sum3 = tl.zeros([BLOCK_C], ACC)
    sum4 = tl.zeros([BLOCK_C], ACC)
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        g = tl.load(gradient + start + offsets, inside, other=0).to(ACC)
        d = tl.load(x + start + offsets, inside, other=0).to(ACC) - mean[None, :]
        u = tl.fma(d, scale[None, :], shift[None, :])
        m = derivative(u, ACTIVATION, SLOPE)
        mg = through(g, m, ACTIVATION)
        sum0 += tl.sum(tl.where(inside, mg, 0), 0)
        sum1 += tl.sum(tl.where(inside, mg * d, 0), 0)
        if GATED:
            sum2 += tl.sum(tl.where(inside, m, 0), 0)
            sum3 += tl.sum(tl.where(inside, through(d, m, ACTIVATION), 0), 0)
            sum4 += tl.sum(tl.where(inside, g * activate(u, ACTIVATION, SLOPE), 0), 0)
    size = tl.cast(count, tl.int64) * C
    target = sums + tl.cast(row, tl.int64) * C + channel
    tl.store(target, sum0, kept)
    tl.store(target + size, sum1, kept)
    if GATED:
        tl.store(target + 2 * size, sum2, kept)
        tl.store(target + 3 * size, sum3, kept)
        tl.store(target + 4 * size, sum4, kept)


@triton.jit
def branch_gradient_kernel(
    gradient, x, dx, rows, gates, dz, per_channel, C, P, splits, tiles,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = m scale (s g + dz / P) + c (x - mean) + e, s the gate; c, e = per_channel (2,C)."""
    n, first_channel, first, _ = locate(
        tl.program_id(0), C, P, splits, tiles, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
    )
    channel = first_channel + tl.arange(0, BLOCK_C)
    kept = channel < C
    mean, scale, shift = branch_rows(rows, channel, kept, C)
    a = scale
    b = tl.zeros([BLOCK_C], ACC)
    if gates is not None:
        at = tl.cast(n, tl.int64) * C + channel
        a = scale * tl.load(gates + at, kept, other=0)
        b = scale * (tl.load(dz + at, kept, other=0) / P)
    c = tl.load(per_channel + channel, kept, other=0)
    e = tl.load(per_channel + C + channel, kept, other=0)
    for tile in range(tiles):
        start, offsets, inside = place(
            n, first_channel, first + tile * BLOCK_P, C, P, CHANNELS_LAST, WIDE, BLOCK_P, BLOCK_C
        )
        g = tl.load(gradient + start + offsets, inside, other=0).to(ACC)
        d = tl.load(x + start + offsets, inside, other=0).to(ACC) - mean[None, :]
        m = derivative(tl.fma(d, scale[None, :], shift[None, :]), ACTIVATION, SLOPE)
        v = through(a[None, :] * g + b[None, :], m, ACTIVATION) + (c[None, :] * d + e[None, :])
        tl.store(dx + start + offsets, v.to(dx.dtype.element_ty), inside)
