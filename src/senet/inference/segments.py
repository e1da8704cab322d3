"""Cutting a network where one map alone goes on, to run its parts on a few images at a time.

The early maps of a large batch do not fit into the cache: each layer would fetch them from memory
again. A part that runs on few images at a time finds them in the cache; but its weights are
fetched once for each group of images, so late parts, whose weights are larger than their maps,
run on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import fx

from senet.inference.buffers import is_map

# Bytes of the maps that a layer reads and writes for one group of images.
_GROUP_BYTES = 4 << 20


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes that run on `images` images at a time.

    Attributes:
        nodes: the nodes, in order.
        images: images of a group; divides the batch.
    """

    nodes: tuple[fx.Node, ...]
    images: int


def cut(
    nodes: list[fx.Node],
    results: Mapping[fx.Node, Any],
    weights: Callable[[fx.Node], int],
    whole: Set[fx.Node] = frozenset(),
    inside: Set[fx.Node] = frozenset(),
    joined: Set[fx.Node] = frozenset(),
) -> list[Segment]:
    """The segments of a graph.

    Args:
        nodes: all nodes of the graph.
        results: the tensor (without data) that each gives, images first.
        weights: bytes of a node's weights.
        whole: nodes that have to run on the whole batch at once.
        inside: nodes whose results do not go through memory.
        joined: further nodes behind which no segment ends.
    """
    batch = int(results[nodes[0]].shape[0])
    pieces: list[list[fx.Node]] = [[]]
    index = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((index[user] for user in node.users), default=-1) for node in nodes}
    alive: set[fx.Node] = set()
    for i, node in enumerate(nodes):
        pieces[-1].append(node)
        alive = {n for n in (alive | {node}) if last_use[n] > i}
        # The input is no part.
        if alive == {node} and is_map(results[node]) and i > 0 and node not in inside | joined:
            pieces.append([])
    if not pieces[-1]:
        pieces.pop()
    segments: list[Segment] = []
    for number, piece in enumerate(pieces):
        together = number == len(pieces) - 1 or not whole.isdisjoint(piece)
        images = batch if together else group_size(piece, results, weights, batch, inside)
        if segments and segments[-1].images == images:
            segments[-1] = Segment((*segments[-1].nodes, *piece), images)
        else:
            segments.append(Segment(tuple(piece), images))
    return segments


def group_size(
    nodes: list[fx.Node],
    results: Mapping[fx.Node, Any],
    weights: Callable[[fx.Node], int],
    batch: int,
    inside: Set[fx.Node] = frozenset(),
) -> int:
    """Images at a time for some nodes: few enough for the cache, enough for their weights."""
    if not all(is_map(results[node]) and results[node].shape[0] == batch for node in nodes):
        return batch
    bytes_of = {n: 4 * results[n].numel() // batch for m in nodes for n in (m, *m.all_input_nodes)}
    bytes_of |= dict.fromkeys(inside, 0)
    sizes = [sum(bytes_of[n] for n in (node, *node.all_input_nodes)) for node in nodes]
    fitting = _GROUP_BYTES / max(sizes)
    needed = sum(map(weights, nodes)) / sum(sizes)
    divisors = [d for d in range(1, batch + 1) if batch % d == 0]
    return max(
        max(d for d in divisors if d <= max(fitting, 1)),
        min(d for d in divisors if d >= min(needed, batch)),
    )
