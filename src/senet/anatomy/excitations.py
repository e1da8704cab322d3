"""SE blocks of any model, by what they compute.

An SE block is a product of a map with something that depends on a map only through a reduction
over all its positions (eq. 2 to 4 of arXiv 1709.01507, whatever the modules are called): squeeze,
a small program on (N,C), a gate function, and a factor (and a shift) on the map.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from senet.anatomy.example import attempt, guessed_arguments
from senet.anatomy.gate_function import gate_chain, gate_function, only_shapes
from senet.anatomy.graph import Call, Node, Site, Trace, record
from senet.anatomy.positions import REDUCTIONS
from senet.errors import UserError

_LAYERS = ("conv", "linear")
_SQUEEZES = {"mean": "avg", "nanmean": "avg", "amax": "max"}
BRANCHES = "softmax between branches: selective kernels or split attention"
_MASKS = ("where", "masked_fill", "pad")


@dataclass(frozen=True)
class Step:
    """An operation of the program between squeeze and product.

    Attributes:
        function: name of the function.
        kind: "conv", "linear", "norm", "activation", …: as in `senet.anatomy.graph`.
        module: dotted name of the innermost module around it.
        inputs: size of each image's vector before; 0 where it takes several.
        outputs: size of each image's vector behind it.
    """

    function: str
    kind: str
    module: str
    inputs: int
    outputs: int

    def __str__(self) -> str:
        layer = self.kind in _LAYERS
        return f"{self.function} {self.inputs}→{self.outputs}" if layer else self.function


@dataclass(frozen=True, eq=False)
class Occurrence:
    """One run of an SE block in a forward pass, as the graph has it.

    Attributes:
        product: the node that scales the map.
        map: what is scaled.
        factor: what it is scaled by: gates that broadcast to the map.
        squeezes: the reductions, in the order of execution.
        program: the nodes between squeezes and factor, in the order of execution.
        end: the node of the shift where there is one, else `product`.
        inside: all nodes that serve this block alone.
    """

    product: Node
    map: Node
    factor: Node
    squeezes: tuple[Node, ...]
    program: tuple[Node, ...]
    end: Node
    inside: frozenset[Node]

    @property
    def site(self) -> Site:
        """Where the product happens."""
        assert self.product.site is not None
        return self.product.site

    def constants(self, gates: Tensor) -> Tensor:
        """Gates (C,) in a shape that broadcasts to the map, of its dtype."""
        shape = [1 if d in self.map.positions else n for d, n in enumerate(self.map.shape)]
        return gates.to(self.map.dtype).reshape(1, *shape[1:])


@dataclass(frozen=True, eq=False)
class Excitation:
    """An SE block of a model.

    Attributes:
        name: dotted name of the module that is the block: it takes the map and gives the scaled
            map. A block that is written inside of a larger module is named by its product: the
            module that computes nothing else if there is one (as in converted graphs), else that
            larger module's name and `mul`, `mul_1`, …, counted among its products.
        module: the module that is the block; None for one that is written inside of another.
        stage: runs of blocks whose maps have one size share a number, from 2 on.
        channels: C, number of gates.
        places: size of the map, without images and channels.
        squeeze: "avg", "max", "std", "sum", "conv" (depthwise over the whole map), "attention"
            (a mean weighted by position), or several joined by "+"; "none" where each position
            has gates of its own (table 16).
        squeezed: what is squeezed: function and module that gave the map.
        scales: what is scaled, likewise; often the same.
        program: the operations between squeeze and gate function.
        gate: name of the gate function, see `GateFunction`.
        limits: smallest and largest gate; None for an unbounded gate function.
        hidden: output of the layer before the last one; None for a single layer.
        shift: whether something of the same squeeze is also added (Lc0).
        weights: its parameters and buffers by their dotted names in the model.
        sites: where the products happen: one for each call in a forward pass.
        occurrences: the same in the graph, of each call.
    """

    name: str
    module: nn.Module | None
    stage: int
    channels: int
    places: tuple[int, ...]
    squeeze: str
    squeezed: str
    scales: str
    program: tuple[Step, ...]
    gate: str
    limits: tuple[float, float] | None
    hidden: int | None
    shift: bool
    weights: Mapping[str, Any] = field(repr=False)
    sites: tuple[Site, ...] = field(repr=False)
    occurrences: tuple[Occurrence, ...] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Number of parameters; buffers do not count."""
        return sum(w.numel() for w in self.weights.values() if isinstance(w, nn.Parameter))


@dataclass(frozen=True)
class Anatomy:
    """What a model consists of, as far as SE is concerned.

    Attributes:
        excitations: its SE blocks by name, in the order of execution.
        others: products that look like one and are none, by name, with what they are.
        unread: parts that could not be looked into, by name, with the reason.
        trace: the forward pass that was read.
    """

    excitations: dict[str, Excitation]
    others: dict[str, str]
    unread: dict[str, str]
    trace: Trace


def excitations(model: nn.Module, example_input: Any = None) -> dict[str, Excitation]:
    """All SE blocks of a model, by what they compute: no names of classes or attributes count.

    Args:
        model: any module: also a `torch.fx.GraphModule` or the module of an exported program. It
            runs once, in evaluation mode and without gradients, and is as before afterwards.
        example_input: what it is called with: a tensor (N,C,*), or a tuple of arguments. By
            default zeros of the size that the model names (`input_size`, timm's and Hugging Face's
            configuration), else of some size with the channels of its first convolution.

    Returns:
        The blocks by name, in the order of execution; none for a network without.

    Raises:
        UserError: there is no example input, or the model does not take it.
    """
    return anatomy(model, example_input).excitations


def anatomy(model: nn.Module, example_input: Any = None) -> Anatomy:
    """As `excitations`, with what was seen and is none, and what could not be read."""
    return read(model, trace_of(model, example_input))


def trace_of(model: nn.Module, example_input: Any = None) -> Trace:
    """A recorded forward pass of a model.

    Raises:
        UserError: as for `excitations`.
    """
    choices = guessed_arguments(model, example_input)
    for number, arguments in enumerate(choices, 1):
        try:
            return attempt(partial(record, model, arguments), arguments)
        except UserError as error:
            if len(choices) == 1:
                raise
            if number == len(choices):
                raise UserError(f"{error}; pass example_input") from error
    raise AssertionError("there is at least one choice")


def read(model: nn.Module, trace: Trace) -> Anatomy:
    """The SE blocks in a recorded forward pass of a model."""
    found: dict[str, list[Occurrence]] = {}
    others: dict[str, str] = {}
    for product, seen in products(trace).items():
        if isinstance(seen, Occurrence):
            found.setdefault(name_of(seen), []).append(seen)
        else:
            others[_inline_name(product)] = seen
    blocks: dict[str, Excitation] = {}
    stage, before = 1, None
    for name, occurrences in found.items():
        places = _places(occurrences[0].map)
        if places != before:
            stage, before = stage + 1, places
        blocks[name] = _excitation(model, name, occurrences, stage)
    return Anatomy(blocks, others, dict(trace.unread), trace)


def products(trace: Trace) -> dict[Node, Occurrence | str]:
    """Products that are SE blocks, and those that look like one with what they are instead."""
    seen = {node: _occurrence(node) for node in trace.nodes if node.site is not None}
    return {node: what for node, what in seen.items() if what is not None}


def _places(node: Node) -> tuple[int, ...]:
    return tuple(node.shape[d] for d in node.positions)


def _channels(node: Node) -> int:
    """Numbers at each position of a map."""
    count = 1
    for d, size in enumerate(node.shape):
        count *= 1 if d == 0 or d in node.positions else size
    return count


def _occurrence(product: Node) -> Occurrence | str | None:
    """The SE block that ends in this product; what the product is instead; None for neither."""
    if len(product.sources) != 2:
        return None
    for factor, scaled in (product.sources, product.sources[::-1]):
        if not scaled.positions or scaled.shape != product.shape:
            continue
        if not factor.reduced:
            found = _by_position(product, factor, scaled)
            if found is not None:
                return found
            continue
        squeezes, program = _program(factor)
        why_not = _why_not(factor, scaled, program)
        if why_not is not None:
            return why_not
        return _made(product, scaled, factor, squeezes, program)
    return None


def _program(factor: Node) -> tuple[list[Node], list[Node]]:
    """The reductions that a factor goes back to, and the operations behind them."""
    squeezes: set[Node] = set()
    program: set[Node] = set()
    open_nodes = [factor]
    while open_nodes:
        node = open_nodes.pop()
        if node in squeezes or node in program or not node.reduced:
            continue  # not reduced: lengths of the input, for instance
        if any(source.positions for source in node.sources):
            squeezes.add(node)
        else:
            program.add(node)
            open_nodes += node.sources
    return tuple(sorted(group, key=lambda n: n.index) for group in (squeezes, program))  # type: ignore[return-value]


def _why_not(factor: Node, scaled: Node, program: list[Node]) -> str | None:
    """What a product with something reduced is, where it is no excitation."""
    offset = len(scaled.shape) - len(factor.shape)
    numbers = [d for d in range(1, len(scaled.shape)) if d not in scaled.positions]
    sizes = [factor.shape[d - offset] if d >= offset else 1 for d in numbers]
    if sizes != [scaled.shape[d] for d in numbers] or max(sizes, default=1) == 1:
        return "one factor for all channels: a mixture of branches or a dynamic convolution"
    if any("softmax" in node.name for node in program):
        return BRANCHES
    layers = any(node.kind in _LAYERS for node in program)
    if not layers and gate_function(gate_chain(factor)[1]).limits is None:
        return "a normalisation or context vector: no layer and no gate behind the reduction"
    return None


def _by_position(product: Node, factor: Node, scaled: Node) -> Occurrence | str | None:
    """Products of two maps: gates of each position by a program on its channels, or attention.

    The former is table 16's NoSqueeze: the map itself times gate(W2 δ(W1 map)).
    """
    if not factor.positions:
        return None
    program = _pointwise_program(factor, scaled)
    if program is not None:
        return _made(product, scaled, factor, [], program)
    alone = all(size == 1 for d, size in enumerate(factor.shape) if d and d not in factor.positions)
    gated = next((n for n in _before(factor) if not only_shapes(n)), factor)
    if alone and _channels(scaled) > 1 and gated.kind == "activation":
        return "attention over positions"
    return None


def _pointwise_program(factor: Node, scaled: Node) -> list[Node] | None:
    """The operations from a map to gates of each position; None where they are anything else.

    A layer, an activation, a layer and a gate function, each on the channels of one position.
    """
    program: set[Node] = set()
    open_nodes = [factor]
    while open_nodes:
        node = open_nodes.pop()
        if node is scaled or node in program:
            continue
        plain = node.kind in ("relu", "activation", "add") or only_shapes(node)
        if not node.positions or not (plain or _is_pointwise(node)):
            return None
        program.add(node)
        open_nodes += node.sources
    ordered = sorted(program, key=lambda n: n.index)
    kinds = [n.kind in _LAYERS for n in ordered if n.kind in ("relu", "activation", *_LAYERS)]
    changes = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    return ordered if changes == [True, False, True, False] else None


def _before(node: Node) -> Iterator[Node]:
    while True:
        yield node
        if len(node.sources) != 1:
            return
        node = node.sources[0]


def _is_pointwise(node: Node) -> bool:
    if node.kind == "linear":
        return len(node.shape) - 1 not in node.positions
    return node.kind == "conv" and set(node.inputs[1].shape[2:]) == {1} and node.stride == 1


def _made(
    product: Node, scaled: Node, factor: Node, squeezes: list[Node], program: list[Node]
) -> Occurrence:
    end = product
    for user in product.users:
        if user.kind == "add" and len(user.sources) == 2 and user.shape == product.shape:
            other = user.sources[user.sources[0] is product]
            if other.reduced and set(_program(other)[0]) <= set(squeezes):
                end = user
                shifted = set(_program(other)[1]) - set(program)
                program = sorted({*program, *shifted}, key=lambda n: n.index)
    inside = {end}
    open_nodes = list(end.sources)
    while open_nodes:  # a node whose users all lie inside
        node = open_nodes.pop()
        outside = node is scaled or node.is_output or node.kind == "input"
        if not outside and node not in inside and inside.issuperset(node.users):
            inside.add(node)
            open_nodes += node.sources
    return Occurrence(
        product, scaled, factor, tuple(squeezes), tuple(program), end, frozenset(inside)
    )


def _moved_from(node: Node) -> Iterator[Node]:
    """A node and those before it that hold the same numbers."""
    yield node
    while len(node.sources) == 1 and only_shapes(node) and node.kind != "part":
        node = node.sources[0]
        yield node


def container(occurrence: Occurrence) -> Call:
    """The innermost module call around squeeze and product."""
    shared = occurrence.product.calls
    for node in occurrence.squeezes or occurrence.program[:1]:
        shared = tuple(a for a, b in zip(shared, node.calls, strict=False) if a is b)
    return shared[-1]


def _is_block(call: Call, occurrence: Occurrence) -> bool:
    """Whether a module call takes the map and gives the scaled map, and that is all."""
    if not call.name or call.output is None or occurrence.end not in _moved_from(call.output):
        return False
    return any(node in call.inputs for node in _moved_from(occurrence.map))


def name_of(occurrence: Occurrence) -> str:
    """Name of the block, as `Excitation.name` describes it."""
    call = container(occurrence)
    return call.name if _is_block(call, occurrence) else _inline_name(occurrence.product)


def _inline_name(product: Node) -> str:
    site, call = product.site, product.calls[-1]
    assert site is not None
    alone = call.output is product and set(call.inputs) >= set(product.sources)
    if alone and call.name and not list(call.module.children()):
        return call.name
    child = f"mul_{site.product}" if site.product else "mul"
    return f"{call.name}.{child}" if call.name else child


def _excitation(
    model: nn.Module, name: str, occurrences: list[Occurrence], stage: int
) -> Excitation:
    first = occurrences[0]
    call = container(first)
    module = call.module if _is_block(call, first) else None
    _, chain = gate_chain(first.factor)
    if not first.squeezes:  # gates of each position
        chain = [node for node in first.program if not only_shapes(node)][-1:]
    function = gate_function(chain)
    layers = [node for node in first.program if node.kind in _LAYERS]
    return Excitation(
        name=name,
        module=module,
        stage=stage,
        channels=_channels(first.map),
        places=_places(first.map),
        squeeze="+".join(dict.fromkeys(_squeeze(n) for n in first.squeezes)) or "none",
        squeezed=_described(_squeezed_map(first)),
        scales=_described(list(_moved_from(first.map))[-1]),
        program=tuple(
            Step(
                node.name,
                node.kind,
                node.calls[-1].name,
                _channels(node.sources[0]) if len(node.sources) == 1 else 0,
                _channels(node),
            )
            for node in first.program
            if node not in chain and not only_shapes(node)
        ),
        gate=function.name,
        limits=function.limits,
        hidden=_channels(layers[0]) if len(layers) > 1 else None,
        shift=first.end is not first.product,
        weights=_weights(model, module, first),
        sites=tuple(occurrence.site for occurrence in occurrences),
        occurrences=tuple(occurrences),
    )


def _weights(
    model: nn.Module, module: nn.Module | None, occurrence: Occurrence
) -> dict[str, Tensor]:
    """Parameters and buffers of the module that is the block, or of the block's operations."""
    named = dict((*model.named_parameters(), *model.named_buffers()))
    if module is not None:
        used = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    else:
        nodes = {*occurrence.inside, *occurrence.squeezes, *occurrence.program}
        used = {id(n.tensor) for node in nodes for n in node.inputs if n.tensor is not None}
    return {name: tensor for name, tensor in named.items() if id(tensor) in used}


def _squeezed_map(occurrence: Occurrence) -> Node:
    """The map whose positions are reduced, before masks, views and sums over some of them."""
    if not occurrence.squeezes:
        return list(_moved_from(occurrence.map))[-1]
    node = occurrence.squeezes[0]
    while True:
        maps = [source for source in node.sources if source.positions]
        partly = node in occurrence.squeezes or node.name in REDUCTIONS or len(maps) == 1
        passed = only_shapes(node) or node.kind in ("mul", "div") or node.name in _MASKS
        if not maps or not (node in occurrence.squeezes or (partly and passed)):
            return node
        node = max(maps, key=_channels)


def _squeeze(node: Node) -> str:
    """Name of a reduction over all positions."""
    name = node.name.lstrip("_")
    maps = [source for source in node.sources if source.positions]
    if node.kind == "conv":
        return "conv"
    if len(maps) > 1 or name in ("matmul", "bmm", "einsum", "scaled_dot_product_attention"):
        return "attention"
    if name == "sum":
        weighted = maps[0].kind == "mul" and all(s.positions for s in maps[0].sources)
        if weighted and len(maps[0].sources) == 2:
            return "attention"
        divided = any(user.kind == "div" and user.args[0] is node for user in node.users)
        return "avg" if divided else "sum"
    if "avg_pool" in name:
        return "avg"
    if "max_pool" in name:
        return "max"
    return _SQUEEZES.get(name, name)


def _described(node: Node) -> str:
    if node.kind == "input":
        return "the input"
    inside = next((call.name for call in reversed(node.calls) if call.name), "")
    return f"{node.name} in {inside}" if inside else node.name
