"""From the rewritten graph to the steps of a program, for one input shape.

What the kernels do not know runs in PyTorch between two stretches of kernel steps.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.inference import chains
from senet.inference.buffers import Buffer, Map, compact, is_map, new_map
from senet.inference.builder import (
    CACHED_WEIGHTS,
    Builder,
    Chained,
    native_gate,
    takes_input_gates,
)
from senet.inference.modules import Across, FusedConv, Pointwise, Shuffle, SqueezeGate, ends_openly
from senet.inference.places import Places, concatenated, first_input
from senet.inference.pools import Pools, pair
from senet.inference.rewrite import ADDS, RELUS, plain
from senet.inference.rewrites.gates import POOLS
from senet.inference.schedule import Geometry
from senet.inference.segments import Segment, cut
from senet.inference.shapes import Unknown, known_shape, traced_results
from senet.inference.steps import Constants, Sums, TorchStep
from senet.kernels.structs import Kind
from senet.nn.padded_shortcut import PaddedShortcut
from senet.ops.activations import RELU

# Layers of PyTorch's own that the kernels know.
_LAYERS = (
    *(nn.ReLU, nn.Flatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
)
PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply)


def _as_rows(result: Any) -> Any:
    """A tensor (N,C,L) as (N,C,1,L), anything else as it is."""
    return result.unsqueeze(2) if isinstance(result, Tensor) and result.ndim == 3 else result


def _in_float32(module: nn.Module) -> bool:
    """Whether the kernels can read a module's weights."""
    weights = (*module._parameters.values(), *module._buffers.values())
    held = [w for w in weights if w is not None]
    return all(w.dtype == torch.float32 and w.device.type == "cpu" for w in held)


def _is_mean(module: nn.Module) -> bool:
    """Whether a layer gives the mean over all positions of a map."""
    return type(module) in POOLS and module.output_size in (1, (1,), (1, 1))


class _NeedsWholeBatchError(Exception):
    """A node that PyTorch runs stands where groups of images would take turns."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(str(node))
        self.node = node


def lower(
    module: fx.GraphModule, x: Tensor, threads: int, constants: Constants, empty: nn.Module
) -> Lowering:
    """The steps of a graph, whose outline is `empty`, for inputs like x; see `Lowering`."""
    results = traced_results(module, empty, x)
    whole: set[fx.Node] = set()
    while True:
        try:
            return Lowering(module, x, threads, constants, results, whole)
        except _NeedsWholeBatchError as error:
            whole.add(error.node)


class Lowering:
    """Walks the graph and lets a `Builder` write the steps.

    Args:
        module: the rewritten graph.
        x: an input of the shape in question.
        threads: threads that will run the program.
        constants: packed weights shared with other programs of the network.
        results: what each node gives for x, as tensors without data.
        whole: nodes that have to run on the whole batch at once.

    Attributes:
        builder: the steps.
        places: where the maps lie.
        traced: what each node gives.
        results: the same; in networks of one spatial dimension, maps of which have one row.
        fixed: what nodes give that follows from the input's shape, and parameters that they are.
        output: what the graph returns, in terms of nodes.
        escaping: containers that PyTorch makes and that are returned, or are part of what is.
        input_images: images that an INPUT step reads.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        x: Tensor,
        threads: int,
        constants: Constants,
        results: Mapping[fx.Node, Any],
        whole: Set[fx.Node],
    ) -> None:
        self.module = module
        self.traced = self.results = results
        if x.ndim == 3:
            self.results = {node: _as_rows(result) for node, result in results.items()}
        self.builder = Builder(threads, constants)
        self.places = Places(self.builder, self.traced, self.results, x.shape[0])
        self.pools = Pools(self.builder, self.places)
        self.sums: dict[fx.Node, Sums] = {}
        self.input_gates: dict[fx.Node, Map] = {}
        self.waits: set[fx.Node] = set()
        self.segment: frozenset[fx.Node] = frozenset()
        self.fixed: dict[fx.Node, Any] = {}
        self.output: Any = None
        self.escaping: set[fx.Node] = set()
        nodes = list(module.graph.nodes)
        for node in nodes:
            if self._is_cat(node):
                self.places.reserve(node)
        self.chains = chains.find(nodes, self._called, self.places.shape, self._apart(), threads)
        self.inside = {node for chain in self.chains.values() for node in chain[:-1]}
        self.segment = frozenset(nodes)
        joined = set(filter(self._joins, nodes))
        segments = cut(nodes, self.results, self._weight_bytes, whole, self.inside, joined)
        self.input_images = segments[0].images
        for segment in segments:
            self.places.slots.pop(segment.nodes[-1], None)
        for segment in segments:
            self._lower_segment(segment)

    def _lower_segment(self, segment: Segment) -> None:
        """Write the steps for one group of images, and copies of them for the other groups."""
        self.places.images, start = segment.images, len(self.builder.steps)
        self.places.crossing, self.segment = segment.nodes[-1], frozenset(segment.nodes)
        shared: list[Buffer] = []
        read = {source for node in segment.nodes for source in node.all_input_nodes}
        for source in read.difference(segment.nodes):
            if source in self.places.values:
                old = self.places.values[source]
                shape = (segment.images, *old.shape[1:])
                self.places.values[source] = replace(old, shape=shape)
                shared.append(old.buffer)
        excited: set[fx.Node] = set()
        for number, node in enumerate(segment.nodes):
            if node in excited:
                continue
            products = self._small_excitation(segment.nodes[number:])
            if products:
                self._excite(node, products)
                excited.update(products)
            else:
                self._lower(node)
        groups = self.places.batch // self.places.images
        if groups == 1:
            return
        shared.append(self.places.values[self.places.crossing].buffer)
        steps = self.builder.steps[start:]
        for group in range(1, groups):
            for step in steps:
                if isinstance(step, TorchStep):
                    raise _NeedsWholeBatchError(step.node)
                maps = {
                    name: replace(where, image=group * self.places.images)
                    if isinstance(where, Map) and where.buffer in shared
                    else where
                    for name, where in step.maps.items()
                }
                self.builder.steps.append(replace(step, maps=maps))
        for buffer in shared:
            buffer.use(start)
            buffer.use(len(self.builder.steps))

    def _small_excitation(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, FusedConv]:
        """The products behind a mean that the nodes begin with; none if they have many weights."""
        first, found = nodes[0], dict[fx.Node, FusedConv]()
        if not self._averages(first) or first.args[0] not in self.places.values:
            return found
        for before, node in pairwise(nodes):
            module = self._called(node)
            if not isinstance(module, FusedConv) or not takes_input_gates(module):
                break
            if node.args != (before,) or len(before.users) > 1 or node in self.places.slots:
                break
            if self.places.crosses(before) or self.places.crosses(node):
                break
            if self.places.shape(node)[1:3] != (1, 1):
                break
            found[node] = module
        weights = sum(module.weight.numel() for module in found.values())
        return found if weights <= CACHED_WEIGHTS else {}

    def _excite(self, mean: fx.Node, products: Mapping[fx.Node, FusedConv]) -> None:
        """Write the steps of a `_small_excitation`."""
        source = first_input(mean)
        with self.builder.excitation_of(self.places.read(source)) as images:
            self._lower(mean)
            for node, module in products.items():
                (before,) = node.all_input_nodes
                x, y = self.places.read(before), self.places.new(node)
                self.builder.excitation(str(node.target), module, x, y, images)
                self.places.values[before].buffer.waiting.discard(node)

    def _weight_bytes(self, node: fx.Node) -> int:
        if node.op != "call_module":
            return 0
        module = self.module.get_submodule(str(node.target))
        return sum(4 * p.numel() for p in module.parameters())

    def _lower(self, node: fx.Node) -> None:
        if node.op == "output":
            self.output = node.args[0]
            for source in node.all_input_nodes:
                if source in self.places.values:
                    self.places.read(source)
                else:
                    self._escapes(source)
            return
        if self._follows_from_shapes(node):
            self.fixed[node] = self.results[node]
            return
        if node.op == "get_attr":
            self.fixed[node] = operator.attrgetter(str(node.target))(self.module)
            return
        if node.op == "placeholder":
            self.builder.emit(
                Kind.INPUT,
                {"x": Buffer(0, offset=0), "y": self.places.new(node)},
                dict(zip("NHWC", self.places.shape(node), strict=True)),
            )
            return
        if self.places.lies_in_another(node):
            return
        if not (is_map(self.results[node]) and self._native(node)):
            self._in_torch(node)
        for source in node.all_input_nodes:
            if source in self.places.values:
                self.places.values[source].buffer.waiting.discard(node)

    def _follows_from_shapes(self, node: fx.Node) -> bool:
        """Whether what a node gives follows from the input's shape: sizes, and what reads those."""
        if node.op not in ("call_function", "call_method"):
            return False
        parts = torch.utils._pytree.tree_leaves(self.results[node])
        if any(isinstance(part, Tensor | torch.device | Unknown) for part in parts):
            return False
        sizes = node.target is getattr and node.args[1] in ("shape", "ndim")
        if sizes or (node.op == "call_method" and node.target in ("size", "dim", "numel")):
            return True
        return bool(node.all_input_nodes) and all(n in self.fixed for n in node.all_input_nodes)

    def _escapes(self, node: fx.Node) -> None:
        """Note that a node's result is returned: what PyTorch makes of maps must be its own."""
        if isinstance(self.results[node], Tensor) or node in self.escaping:
            return
        self.escaping.add(node)
        for source in node.all_input_nodes:
            self._escapes(source)

    def _native(self, node: fx.Node) -> bool:
        """Write the steps of a node; False if the kernels cannot run it."""
        sources = node.all_input_nodes
        known = self.places.values.keys() | self.waits
        if not sources or any(source not in known for source in sources) or not node.args:
            return False
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            return _in_float32(module) and self._native_module(node, module)
        if node.op == "call_method":
            if node.target in ("mul", "mul_", "multiply") and len(node.args) == 2:
                return not node.kwargs and self._multiply(node)
            if node.target == "amax":
                return self.pools.maxima(node)
            return node.target in ("relu", "relu_") and self._relu(node)
        return self._native_function(node)

    def _called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if the kernels can read its weights."""
        if node.op != "call_module" or not is_map(self.results[node]):
            return None
        module = self.module.get_submodule(str(node.target))
        return module if _in_float32(module) and self._of_one_shape(node, module) else None

    def _apart(self) -> set[fx.Node]:
        """Nodes whose results have a place of their own."""
        ends = [node for node in self.results if node.op == "output"]
        outputs = {source for end in ends for source in end.all_input_nodes}
        return outputs | set(self.places.slots)

    def _wait_for_chain(self, node: fx.Node) -> None:
        """Keep what a convolution reads until the last one of its chain runs."""
        (last,) = (last for last, chain in self.chains.items() if node in chain)
        for source in node.all_input_nodes:
            if source in self.places.values:
                self.places.values[source].buffer.waiting.add(last)
            if source in self.input_gates:
                self.input_gates[source].buffer.waiting.add(last)
        self.waits.add(node)

    def _chain(self, node: fx.Node) -> None:
        """Write the steps of a chain at its last node."""
        links, plan = [], []
        for each in self.chains[node]:
            module, source = self.module.get_submodule(str(each.target)), first_input(each)
            assert isinstance(module, FusedConv)
            gates, shortcut = (
                *(self.places.read(a) if isinstance(a, fx.Node) else None for a in each.args[1:]),
                *(None, None),
            )[:2]
            scaled = self.input_gates.get(source)
            shape = self.places.shape(each)
            links.append(Chained(str(each.target), module, shape, gates, shortcut, scaled))
            made = chains.link(module, self.places.shape(source)[1:], shape[1:])
            assert made is not None
            plan.append(made)
        x = self.places.read(first_input(self.chains[node][0]))
        y = self.places.over(node, links[-1].shortcut, x)
        cut_up = chains.cut(tuple(plan), self.places.images, self.builder.threads)
        summed = self.builder.chain(links, x, y, cut_up, sums=self._feeds_gate(node))
        if summed is not None:
            self.sums[node] = summed

    def _native_module(self, node: fx.Node, module: nn.Module) -> bool:
        if node in self.inside:
            self._wait_for_chain(node)
            return True
        if node in self.chains:
            self._chain(node)
            return True
        if not self._of_one_shape(node, module):
            return False
        maps = [self.places.read(a) if isinstance(a, fx.Node) else None for a in node.args]
        x = maps[0]
        if x is None:
            return False  # it is given several maps in a list, or by name
        if isinstance(module, _LAYERS) and type(module) not in _LAYERS:
            return False  # it may compute something else
        name = str(node.target)
        match module:
            case Pointwise() if self._scales_an_input(node):
                self.places.alias(node, first_input(node))
                gates = maps[1]
                assert gates is not None
                gates.buffer.waiting.update(node.users)
                self.input_gates[node] = gates
            case FusedConv() | Pointwise():
                gates, shortcut = (*maps[1:], None, None)[:2]
                in_place = isinstance(module, Pointwise) and shortcut is None
                old, other = (x, None) if in_place else (shortcut, x)
                y = self.places.over(node, old, other)
                if isinstance(module, FusedConv):
                    squeezed = self._feeds_gate(node)
                    source = first_input(node)
                    sums = self.builder.convolution(
                        name,
                        module,
                        x,
                        y,
                        gates,
                        shortcut,
                        input_gates=self.input_gates.get(source),
                        sums=squeezed,
                    )
                    if sums is not None:
                        self.sums[node] = sums
                else:
                    self.builder.pointwise(name, module, x, y, gates, shortcut)
            case Shuffle():
                self._shuffle(node, module, x)
            case Across():
                self._across(node, name, module, x)
            case SqueezeGate() if native_gate(module):
                self.builder.gates(name, module, x, self.places.new(node), self._branches(node))
            case nn.Linear() if plain(module) and len(self.results[node].shape) == 2:
                self.builder.linear(name, module, x, self.places.new(node))
            case nn.ReLU():
                return self._relu(node)
            case nn.Flatten() if module.start_dim == 1 and x.shape[1] * x.shape[2] == 1:
                self.places.alias(node, first_input(node))
            case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d() if _is_mean(module):
                source = first_input(node)
                summed = self.sums.get(source) if source in self.segment else None
                self.builder.means(x, Geometry(), self.places.new(node), summed)
            case nn.AdaptiveAvgPool2d() if pair(module.output_size) == x.shape[1:3]:
                self.places.alias(node, first_input(node))
            case PaddedShortcut():
                self._padded_shortcut(node, module, x)
            case _:
                return self.pools.layer(node, module, x)
        return True

    def _native_function(self, node: fx.Node) -> bool:
        target, args, kwargs = node.target, node.args, node.kwargs
        if target in RELUS:
            return self._relu(node)
        if self._is_cat(node):
            self._concatenate(node)
            return True
        if target in ADDS and len(args) == 2 and not kwargs:
            a, b = args
            if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
                return False
            if self.places.shape(a) != self.places.shape(b):
                return False
            x, shortcut = self.places.read(a), self.places.read(b)
            self.builder.copy(x, self.places.over(node, shortcut, x), shortcut=shortcut)
            return True
        if target in PRODUCTS and not kwargs and len(args) == 2:
            return self._multiply(node)
        if target is torch.flatten and args[1:] == (1,) and not kwargs:
            source = first_input(node)
            if self.places.shape(source)[1:3] == (1, 1):
                self.places.alias(node, source)
                return True
        if target is torch.amax:
            return self.pools.maxima(node)
        return self.pools.function(node)

    def _of_one_shape(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether gates and shortcut fit what they meet, and PyTorch need not repeat them."""
        if not isinstance(module, FusedConv | Pointwise):
            return True
        x, *rest = (self.traced[a] if isinstance(a, fx.Node) else None for a in node.args)
        shape, gates = tuple(self.traced[node].shape), rest[0] if rest else None
        fitting = gates is None or tuple(gates.shape[:2]) == shape[:2]
        return fitting and known_shape(module, x, *rest) == shape

    def _shuffle(self, node: fx.Node, module: Shuffle, x: Map) -> None:
        """Channels of groups in turns; the pass for that leaves no gaps between pixels."""
        alone = node not in self.places.slots and not self.places.crosses(node)
        y = self.places.new(node, compact if alone else new_map)
        target = y if alone else compact(x.shape)
        self.builder.shuffle(x, target, module.groups)
        if not alone:
            self.builder.copy(target, y)

    def _across(self, node: fx.Node, name: str, module: Across, x: Map) -> None:
        """A convolution over channels, as one of rows: where vectors lie without gaps, in place."""
        y = self.places.new(node)
        source, target = (where if where.compact else compact(where.shape) for where in (x, y))
        if source is not x:
            self.builder.copy(x, source)
        self.builder.convolution(name, module.conv, source.rows, target.rows)
        if target is not y:
            self.builder.copy(target, y)

    def _relu(self, node: fx.Node) -> bool:
        source = first_input(node)
        x = self.places.read(source)
        self.builder.copy(x, self.places.over(node, x, None), activation=RELU)
        return True

    def _multiply(self, node: fx.Node) -> bool:
        """A map times a number, or times a vector for each image."""
        maps = [a for a in node.args if isinstance(a, fx.Node)]
        if len(maps) == 2:
            return self._scale(node, *maps) or self._scale(node, *reversed(maps))
        numbers = [a for a in node.args if isinstance(a, int | float)]
        if len(maps) != 1 or len(numbers) != 1:
            return False
        module = Pointwise()
        module.multiply(float(numbers[0]))
        self.builder.pointwise(node.name, module, self.places.read(maps[0]), self.places.new(node))
        return True

    def _scale(self, node: fx.Node, scaled: fx.Node, factor: fx.Node) -> bool:
        """A map (N,C,H,W) times (N,C,1,1), or (N,C) times (N,C)."""
        shape, other = self.results[scaled].shape, self.results[factor].shape
        if self.results[node].shape != shape or len(other) != len(shape):
            return False
        if other[:2] != shape[:2] or any(size != 1 for size in other[2:]):
            return False
        x, gates = self.places.read(scaled), self.places.read(factor)
        y = self.places.over(node, x, gates)
        self.builder.pointwise(node.name, Pointwise(), x, y, gates)
        return True

    def _padded_shortcut(self, node: fx.Node, module: PaddedShortcut, x: Map) -> None:
        """As a 1×1 convolution whose weights are an identity with empty rows around it."""
        C, total = x.shape[3], x.shape[3] + module.new_channels
        conv = nn.Conv2d(C, total, 1, module.stride, bias=False)
        nn.init.zeros_(conv.weight)
        before = module.new_channels // 2
        with torch.no_grad():
            conv.weight[before : before + C, :, 0, 0] = torch.eye(C)
        self.builder.convolution(str(node.target), FusedConv(conv), x, self.places.new(node))

    def _is_cat(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target is not torch.cat:
            return False
        if not node.args or not isinstance(node.args[0], list | tuple):
            return False
        dim = (*node.args[1:], node.kwargs.get("dim", 0))[0]
        maps = all(is_map(self.results[part]) for part in concatenated(node))
        if not maps or not isinstance(dim, int) or not is_map(self.results[node]):
            return False
        return dim % self.traced[node].ndim == 1 and bool(self.results[node].ndim == 4)

    def _squeezes_concat(self, node: fx.Node) -> bool:
        """Whether a node is an SE gate on a concat whose sums the branches can take."""
        if not self._squeezes(node):
            return False
        module, source = self.module.get_submodule(str(node.target)), first_input(node)
        assert isinstance(module, SqueezeGate)
        return module.geometry is None and source in self.segment and self._is_cat(source)

    def _squeezes(self, node: fx.Node) -> bool:
        """Whether a node is an SE gate that the kernels know, in the part of the graph at hand."""
        if node.op != "call_module" or node not in self.segment:
            return False
        module = self.module.get_submodule(str(node.target))
        return isinstance(module, SqueezeGate) and native_gate(module)

    def _joins(self, node: fx.Node) -> bool:
        """Whether the steps before and behind a node's result do less work in one segment."""
        if not is_map(self.results[node]):
            return False
        if self._feeds_gate(node):
            return True
        scaling = node.op == "call_module" and isinstance(self._called(node), Pointwise)
        return scaling and self._scales_an_input(node)

    def _averages(self, node: fx.Node) -> bool:
        """Whether a node is the mean over a map, in the part of the graph at hand."""
        if node.op != "call_module" or node not in self.segment:
            return False
        return _is_mean(self.module.get_submodule(str(node.target)))

    def _scales_an_input(self, node: fx.Node) -> bool:
        """Whether a node only scales the input of a convolution that can do it itself."""
        module = self.module.get_submodule(str(node.target))
        assert isinstance(module, Pointwise)
        if not (ends_openly(module) and module.scale is None and module.factor == 1):
            return False
        if len(node.args) != 2 or len(node.users) != 1 or node in self.places.slots:
            return False
        (user,) = node.users
        if user.op != "call_module" or user not in self.segment or self.places.crosses(node):
            return False
        conv = self._called(user)
        reads_once = user.args[0] is node and node not in user.args[1:]
        return isinstance(conv, FusedConv) and takes_input_gates(conv) and reads_once

    def _feeds_gate(self, node: fx.Node) -> bool:
        """Whether SE squeezes what a convolution writes, or the concat that it writes into."""
        if node not in self.segment:
            return False
        if any(self._squeezes(user) or self._averages(user) for user in node.users):
            return True
        if node not in self.places.slots:
            return False
        return any(self._squeezes_concat(user) for user in self.places.slots[node][0].users)

    def _branches(self, node: fx.Node) -> list[Map | Sums]:
        """What an SE gate squeezes: a summed map, or the parts of a concat if one was summed."""
        source = first_input(node)
        if source in self.sums and source in self.segment:
            return [self.sums[source]]
        if not self._squeezes_concat(node):
            return []
        whole, channel = self.places.values[source], 0
        found: list[Map | Sums] = []
        for part in concatenated(source):
            shape = self.places.shape(part)
            place = Map(whole.buffer, shape, whole.ld, whole.channel + channel)
            found.append(self.sums.get(part, place))
            channel += shape[3]
        return found if self.sums.keys() & set(concatenated(source)) else []

    def _concatenate(self, node: fx.Node) -> None:
        # Its first part has made it.
        whole_map = self.places.values.get(node) or self.places.new(node)
        channel = 0
        for part in concatenated(node):
            x = self.places.read(part)
            slot = Map(whole_map.buffer, x.shape, whole_map.ld, whole_map.channel + channel)
            if (x.buffer, x.channel) != (slot.buffer, slot.channel):
                self.builder.copy(x, slot)
            channel += x.shape[3]

    def _in_torch(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in self.places.values:
                self.places.read(source)
        target = self.places.new(node) if is_map(self.results[node]) else None
        if target is not None:
            self.builder.touch(target)
        else:  # it may be a view of its inputs: they must stay
            for source in node.all_input_nodes:
                if source in self.places.values:
                    self.places.values[source].buffer.last = 1 << 60
        self.builder.steps.append(TorchStep(node, target))
