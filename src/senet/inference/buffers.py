"""Maps of a program and the memory that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

# Floats between two buffers, so that equal offsets in them fall into different cache sets.
_GAP = 16 * 5


Shape = tuple[int, int, int, int]  # N, H, W, C


@dataclass(eq=False)
class Buffer:
    """Memory from the step that writes it first to the one that reads it last.

    Attributes:
        size: number of floats.
        first: index of the first step that uses it.
        last: index of the last step that uses it.
        offset: where it lies in the arena; set by `place`.
        waiting: graph nodes that still have to read it.
    """

    size: int
    first: int = -1
    last: int = -1
    offset: int = -1
    waiting: set[fx.Node] = field(default_factory=set)

    def use(self, step: int) -> None:
        """Note that a step reads or writes it."""
        self.first = step if self.first < 0 else min(self.first, step)
        self.last = max(self.last, step)


@dataclass(frozen=True)
class Map:
    """A feature map (N,C,H,W) in channels_last order, or vectors (N,C) with H = W = 1.

    Attributes:
        buffer: where it lies.
        shape: N, H, W, C.
        ld: floats from one pixel to the next.
        channel: first channel's position among the `ld` floats.
        image: first image's position in the buffer.
    """

    buffer: Buffer
    shape: Shape
    ld: int
    channel: int = 0
    image: int = 0

    @property
    def offset(self) -> int:
        """Position of its first number in the arena."""
        _, H, W, _ = self.shape
        return self.buffer.offset + self.image * H * W * self.ld + self.channel

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def alone(self) -> bool:
        """Whether it has its buffer for itself."""
        return self.buffer.size == self.pixels * self.ld and self.channel == 0

    @property
    def compact(self) -> bool:
        """Whether these are vectors without gaps between them."""
        N, H, W, C = self.shape
        one = N == 1 and self.buffer.size == self.ld
        return H == W == 1 and (one or self.ld == C)

    @property
    def rows(self) -> Map:
        """Compact vectors (N,C) as rows of one channel."""
        N, _, _, C = self.shape
        return Map(self.buffer, (N, 1, C, 1), 1, self.channel, self.image)

    def tensor(self, arena: Tensor, dims: int) -> Tensor:
        """A view of it in the arena: (N,C,H,W), (N,C), or (N,C,W) of maps of one row."""
        N, H, W, C = self.shape
        if dims == 2:
            return arena.as_strided((N, C), (self.ld, 1), self.offset)
        if dims == 3:
            return arena.as_strided((N, C, W), (W * self.ld, 1, self.ld), self.offset)
        return arena.as_strided(
            (N, C, H, W), (H * W * self.ld, 1, W * self.ld, self.ld), self.offset
        )


def new_map(shape: Shape) -> Map:
    """A map in a buffer of its own.

    Pixels of many channels are spread so that those of a register tile, which are read together,
    do not fall into the same sets of the cache.
    """
    C = shape[3]
    ld = C
    if C > 3:
        ld = (C + 15) // 16 * 16
        if ld % 512 == 0:
            ld += 16
    return Map(Buffer(shape[0] * shape[1] * shape[2] * ld), shape, ld)


def compact(shape: Shape) -> Map:
    """A map in a buffer of its own, without gaps between its pixels."""
    return Map(Buffer(math.prod(shape)), shape, shape[3])


def place(buffers: list[Buffer]) -> int:
    """Give buffers whose lives overlap different places; the arena's size in floats."""
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: -b.size):
        taken = sorted(
            (other.offset, other.offset + other.size + _GAP)
            for other in placed
            if other.first <= buffer.last and buffer.first <= other.last
        )
        offset = 0
        for begin, end in taken:
            if offset + buffer.size + _GAP <= begin:
                break
            offset = max(offset, (end + 15) // 16 * 16)
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + buffer.size)
    return total


def is_map(value: object) -> bool:
    """Whether a traced value can be a `Map`: float32 with two or four dimensions."""
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim in (2, 4)
