"""Where the results of a graph's nodes lie in a program's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from senet.inference.buffers import Map, Shape, new_map
from senet.inference.builder import Builder
from senet.inference.rewrites.slices import channel_bounds, channel_sizes


def first_input(node: fx.Node) -> fx.Node:
    """The node that a node reads first."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def concatenated(cat: fx.Node) -> list[fx.Node]:
    """What a concat puts together."""
    parts = cat.args[0]
    assert isinstance(parts, list | tuple)
    return [part for part in parts if isinstance(part, fx.Node)]


class Places:
    """Finds places for the maps of a graph's nodes, and remembers them.

    Args:
        builder: hears which maps its next step uses.
        traced: what each node gives, as tensors without data.
        results: the same; in networks of one spatial dimension, maps of which have one row.
        batch: images of the network's input.

    Attributes:
        values: map of each node that lies in the arena.
        slots: concat and first channel of each node that is written where a concat wants it.
        splits: nodes whose parts are read where the map that they split lies.
        images: images of the group that steps are written for.
        crossing: the node whose result is collected from groups of images.
    """

    def __init__(
        self,
        builder: Builder,
        traced: Mapping[fx.Node, Any],
        results: Mapping[fx.Node, Any],
        batch: int,
    ) -> None:
        self.builder = builder
        self.traced, self.results = traced, results
        self.values: dict[fx.Node, Map] = {}
        self.slots: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.splits: dict[fx.Node, fx.Node] = {}
        self.images = self.batch = batch
        self.crossing: fx.Node | None = None

    def reserve(self, cat: fx.Node) -> None:
        """Let the parts of a concat be written where the concat wants them."""
        channel = 0
        for part in concatenated(cat):
            if part not in self.slots and part.op != "placeholder":
                self.slots[part] = (cat, channel)
            channel += self.shape(part)[3]

    def shape(self, node: fx.Node) -> tuple[int, int, int, int]:
        """N, H, W, C of a node's result."""
        shape = self.results[node].shape
        N, C, H, W = (*shape, 1, 1)[:4]
        if self.batch == N:
            N = self.images
        return int(N), int(H), int(W), int(C)

    def read(self, node: fx.Node) -> Map:
        """The map of a node, which the next step uses."""
        found = self.values[node]
        self.builder.touch(found)
        return found

    def new(self, node: fx.Node, make: Callable[[Shape], Map] = new_map) -> Map:
        """A place for a node's result: its slot in a concat, or a buffer of its own."""
        shape = self.shape(node)
        if node in self.slots:
            cat, channel = self.slots[node]
            if cat not in self.values:
                self.new(cat)
            whole_map = self.values[cat]
            made = Map(whole_map.buffer, shape, whole_map.ld, whole_map.channel + channel)
        elif self.crosses(node):
            made = replace(new_map((self.batch, *shape[1:])), shape=shape)
        else:
            made = make(shape)
        self.values[node] = made
        made.buffer.waiting.update(node.users)
        return made

    def crosses(self, node: fx.Node) -> bool:
        """Whether a node's result is collected from groups of images."""
        return node is self.crossing and self.images < self.batch

    def alias(self, node: fx.Node, source: fx.Node) -> None:
        """Let a node's result be that of another one."""
        if self.crosses(node):
            self.builder.copy(self.read(source), self.new(node))
            return
        self.values[node] = self.values[source]
        self.values[node].buffer.waiting.update(node.users)

    def lies_in_another(self, node: fx.Node) -> bool:
        """Whether a node splits a map by channels, or is a part of one, which needs no step."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or self.crosses(node):
            return False
        if source in self.values and channel_sizes(node, self.traced) is not None:
            buffer = self.values[source].buffer  # each part has to be read
            buffer.waiting.update(node.users)
            buffer.waiting.discard(node)
            self.splits[node] = source
            return True
        first = 0
        if source in self.splits:
            sizes = channel_sizes(source, self.traced) or ()
            place = node.args[1]
            assert isinstance(place, int)
            source, first = self.splits[source], sum(sizes[: place % len(sizes)])
        elif source in self.values and (bounds := channel_bounds(node, self.traced)) is not None:
            first = bounds[0]
        else:
            return False
        whole_map = self.read(source)
        self.values[node] = replace(
            whole_map, shape=self.shape(node), channel=whole_map.channel + first
        )
        whole_map.buffer.waiting.update(node.users)
        whole_map.buffer.waiting.discard(node)
        return True

    def over(self, node: fx.Node, old: Map | None, other: Map | None) -> Map:
        """A place for a node's result: over the map `old` where nobody else reads that any more.

        Each element of `old` is read just before the result's element at its place is written.
        """
        if (
            old is not None
            and node not in self.slots
            and not self.crosses(node)
            and old.alone
            and old.shape == self.shape(node)
            and (other is None or other.buffer is not old.buffer)
            and old.buffer.waiting <= {node}
        ):
            self.values[node] = old
            old.buffer.waiting.update(node.users)
            return old
        return self.new(node)
