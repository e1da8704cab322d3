"""A kernel that writes down where a tile of the operator's kernels lies."""

import triton
import triton.language as tl

from senet.ops.triton.kernels import place

BLOCK_P, BLOCK_C = 8, 16


@triton.jit
def offsets_kernel(
    out, n, first_channel, first_pixel, C, P, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr
):
    start, offsets, inside = place(n, first_channel, first_pixel, C, P, CHANNELS_LAST, WIDE, 8, 16)
    at = tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.where(inside, start + offsets, -1))
