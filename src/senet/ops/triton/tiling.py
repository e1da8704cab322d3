"""How the Triton kernels cut a map into tiles and programs: a function of its shape alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

# Elements of a tile: 16 a thread leave room for three sums and the loads in the registers.
_TILE = {torch.float64: 1024}
_DEFAULT_TILE = 2048
# Channels (channels_last) or pixels (contiguous) of a tile at most; a row of 64 fills a cache line
# in 16 bits.
_WIDTH = {True: 64, False: 512}
# Tiles that a program sums at most, the bound of `moments_kernel`'s error; programs wanted so that
# a large GPU is full. Neither depends on the GPU, so results do not.
_MOST_TILES = 32
_PROGRAMS = 1024
_INT32 = 2**31 - 1


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiling:
    """How a pass over (N,C,P) is cut: programs of `tiles` tiles of an image and its channels.

    Attributes:
        splits: chunks of an image's pixels.
        tiles: tiles of a chunk.
        programs: how many there are.
        constants: compile-time constants of the kernels.
    """

    splits: int
    tiles: int
    programs: int
    constants: dict[str, Any]

    @property
    def chunk(self) -> int:
        """Pixels of a chunk."""
        return int(self.tiles * self.constants["BLOCK_P"])


@functools.lru_cache(maxsize=1024)
def tiling(
    N: int, C: int, P: int, channels_last: bool, dtype: torch.dtype, most_tiles: int = _MOST_TILES
) -> Tiling:
    """The tiling of a pass; a function of the shape alone.

    Args:
        N, C, P: images, channels, pixels.
        channels_last: order in memory.
        dtype: storage of the map.
        most_tiles: of a program.
    """
    size, width = _TILE.get(dtype, _DEFAULT_TILE), _WIDTH[channels_last]
    near, far = (C, P) if channels_last else (P, C)
    first = min(power_of_two(near), width)
    second = min(power_of_two(far), size // first)
    first = min(power_of_two(near), size // second, 4 * width)
    block_c, block_p = (first, second) if channels_last else (second, first)
    columns = -(-C // block_c)
    per_image = -(-P // block_p)
    wanted = min(per_image, -(-_PROGRAMS // (N * columns)))
    tiles = min(most_tiles, -(-per_image // wanted))
    splits = -(-per_image // tiles)
    constants = {
        "CHANNELS_LAST": channels_last,
        "WIDE": max(block_p, 1) * C > _INT32 if channels_last else block_c * P > _INT32,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    return Tiling(splits, tiles, N * splits * columns, constants)
