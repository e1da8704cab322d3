"""Convolutions that run a few rows at a time, one behind the other.

A 1×1 convolution that expands, the depthwise convolution behind it and the 1×1 convolution that
projects: the wide maps between them would go through memory. In a chain each is made a few rows at
a time in a thread's scratch memory, where the next one finds it in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from senet.inference.modules import FusedConv
from senet.inference.schedule import Geometry, narrow_groups, winograd_tile

LONGEST = 3
# Bytes of the maps between a chain's convolutions that a thread holds, and from where on those of
# an image are worth a chain.
_HELD_BYTES = 256 << 10
_WIDE_BYTES = 1 << 20
# Products that are computed twice, where two tasks meet in an image, per product.
_TWICE = 0.15
# Rows that are moved to the front of the memory that holds them, per row that is new.
_MOVED = 0.5
# Products of an output of a convolution whose patches are gathered.
_PATCH = 512


@dataclass(frozen=True)
class Link:
    """A convolution of a chain.

    Attributes:
        geometry: its numbers.
        input: height, width and channels of its input.
        output: those of its output.
    """

    geometry: Geometry
    input: tuple[int, int, int]
    output: tuple[int, int, int]

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved alone."""
        return self.geometry.groups == self.input[2] == self.output[2] and self.input[2] > 1

    @property
    def row_floats(self) -> int:
        """Floats of a row of its output in scratch memory, at most."""
        return self.output[1] * (self.output[2] + 31)

    @property
    def row_products(self) -> int:
        """Products of a row of its output."""
        kernel = self.geometry.kernel[0] * self.geometry.kernel[1]
        return self.output[1] * self.output[2] * kernel * self.input[2] // self.geometry.groups


@dataclass(frozen=True)
class Cut:
    """How a chain is cut.

    Attributes:
        rows: rows of the last output at a time.
        parts: tasks of an image.
        lines: rows of each output that are held at a time.
    """

    rows: int
    parts: int
    lines: tuple[int, ...]


def link(
    module: FusedConv, input: tuple[int, int, int], output: tuple[int, int, int]
) -> Link | None:
    """A convolution as a link, or None if the kernels cannot run it in a chain."""
    H, W, C = input
    kernel = (module.weight.shape[2], module.weight.shape[3])
    before, behind = module.zeros(H, W)
    geometry = Geometry(kernel, module.stride, before, module.dilation, module.groups)
    found = Link(geometry, input, output)
    if not found.depthwise:
        if winograd_tile(geometry, C, output[2], H, W) or narrow_groups(geometry, C, output[2]):
            return None
        if kernel != (1, 1) and kernel[0] * kernel[1] * C // geometry.groups > _PATCH:
            return None
        if kernel == (1, 1) and (before != (0, 0) or behind != (0, 0)):
            return None
    return found


def held_lines(links: tuple[Link, ...], rows: int) -> tuple[int, ...]:
    """Rows of each output that so many rows of the last one need."""
    lines = [rows]
    for after in reversed(links[1:]):
        geometry = after.geometry
        reach = (geometry.kernel[0] - 1) * geometry.dilation[0] + 1
        lines.append(min((lines[-1] - 1) * geometry.stride[0] + reach, after.input[0]))
    return tuple(reversed(lines))


def cut(links: tuple[Link, ...], images: int, threads: int) -> Cut:
    """How a chain for so many images is cut."""
    height = links[-1].output[0]
    rows = max([n for n in range(1, height + 1) if _held(links, n) <= _HELD_BYTES], default=1)
    parts = min(math.ceil(2 * threads / images), math.ceil(height / rows))
    while parts > 1 and _twice(links) * (parts - 1) > _TWICE:
        parts -= 1
    return Cut(rows, parts, held_lines(links, rows))


def pays(links: tuple[Link, ...], images: int, threads: int) -> bool:
    """Whether a chain is worth its while: maps that are wide, and work for all threads."""
    wide = sum(4 * each.output[0] * each.row_floats for each in links[:-1])
    if wide < _WIDE_BYTES or _held(links, 1) > 2 * _HELD_BYTES:
        return False
    if all(each.geometry.kernel == (1, 1) for each in links[1:]):
        return False
    chosen = cut(links, images, threads)
    for number, lines in enumerate(chosen.lines):
        new = chosen.rows * _stride(links[number + 1 :])
        if lines - new > _MOVED * new:
            return False
    return images * chosen.parts >= threads


def _stride(links: tuple[Link, ...]) -> int:
    """Rows of what enters some convolutions per row of what leaves them."""
    return math.prod(each.geometry.stride[0] for each in links)


def _held(links: tuple[Link, ...], rows: int) -> int:
    """Bytes of the maps between convolutions for so many rows of the last output."""
    lines = held_lines(links, rows)[:-1]
    return sum(4 * n * each.row_floats for n, each in zip(lines, links, strict=False))


def _twice(links: tuple[Link, ...]) -> float:
    """Products that are computed twice where two tasks meet, per product of an image."""
    twice = 0
    for number, each in enumerate(links):
        again = held_lines(links[number:], 1)[0] - _stride(links[number + 1 :])
        twice += max(again, 0) * each.row_products
    return twice / sum(each.output[0] * each.row_products for each in links)


def find(
    nodes: Collection[fx.Node],
    module_of: Callable[[fx.Node], Any],
    shape: Callable[[fx.Node], tuple[int, int, int, int]],
    apart: Collection[fx.Node],
    threads: int,
) -> Mapping[fx.Node, tuple[fx.Node, ...]]:
    """The chains of a graph, each by its last node.

    Args:
        nodes: the graph's nodes, in order.
        module_of: the module that a node calls if the kernels run it, else None.
        shape: N, H, W, C of what a node gives.
        apart: nodes whose result cannot stay in a chain.
        threads: threads that will run them.
    """

    def linked(node: fx.Node) -> Link | None:
        module, source = module_of(node), node.args[0] if node.args else None
        if not isinstance(module, FusedConv) or not isinstance(source, fx.Node):
            return None
        made = link(module, shape(source)[1:], shape(node)[1:])
        if made is not None and made.depthwise and any(arg is not None for arg in node.args[1:]):
            return None  # gates and a shortcut are a pass of their own
        return made

    chains: dict[fx.Node, tuple[fx.Node, ...]] = {}
    taken: set[fx.Node] = set()
    for first in nodes:
        run, links = [first], [linked(first)]
        if first in taken or links[0] is None:
            continue
        while len(run) < LONGEST and len(run[-1].users) == 1 and run[-1] not in apart:
            (user,) = run[-1].users
            following = linked(user)
            if following is None or run[-1] is not user.args[0] or run[-1] in user.args[1:]:
                break
            run.append(user)
            links.append(following)
        for length in range(len(run), 1, -1):
            part = tuple(each for each in links[:length] if each is not None)
            if pays(part, shape(first)[0], threads):
                chains[run[length - 1]] = tuple(run[:length])
                taken.update(run[:length])
                break
    return chains
