"""Products that are SE blocks, in the graph of one run.

A map times something that depends on a map only through a reduction over all its positions; and
what only looks like that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from senet.anatomy.gate_function import gate_chain, gate_function, only_shapes
from senet.anatomy.graph import LAYERS, Call, Node, Site, Trace

# Functions that can scale a map by channel without being a product that could be listened to.
_OTHER_FORMS = ("einsum", "addcmul", "addcmul_")
BRANCHES = "softmax between branches: selective kernels or split attention"


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


def products(trace: Trace) -> dict[Node, Occurrence | str]:
    """Products that are SE blocks, and those that look like one with what they are instead."""
    seen = {
        node: _other_form(node) if node.site is None else _occurrence(node) for node in trace.nodes
    }
    return {node: what for node, what in seen.items() if what is not None}


def places_of(node: Node) -> tuple[int, ...]:
    """Sizes of the dimensions that hold positions."""
    return tuple(node.shape[d] for d in node.positions)


def channels_of(node: Node) -> int:
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


def _other_form(node: Node) -> str | None:
    """What scales a map by something reduced and is not written as a product; None for the rest."""
    if node.name not in _OTHER_FORMS:
        return None
    scaled = any(source.positions and source.shape == node.shape for source in node.sources)
    gated = any(source.reduced and not source.positions for source in node.sources)
    return f"written as {node.name}: only map * gates is read as SE" if scaled and gated else None


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
    layers = any(node.kind in LAYERS for node in program)
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
    if alone and channels_of(scaled) > 1 and gated.kind == "activation":
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
    kinds = [n.kind in LAYERS for n in ordered if n.kind in ("relu", "activation", *LAYERS)]
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


def moved_from(node: Node) -> Iterator[Node]:
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


def is_block(call: Call, occurrence: Occurrence) -> bool:
    """Whether a module call takes the map and gives the scaled map, and that is all."""
    if not call.name or call.output is None or occurrence.end not in moved_from(call.output):
        return False
    return any(node in call.inputs for node in moved_from(occurrence.map))


def name_of(occurrence: Occurrence) -> str:
    """Name of the block, as `Excitation.name` describes it."""
    call = container(occurrence)
    return call.name if is_block(call, occurrence) else inline_name(occurrence.product)


def inline_name(product: Node) -> str:
    """Name of a product that is written inside of a larger module."""
    site, call = product.site, product.calls[-1]
    if site is None:
        return f"{call.name}.{product.name}" if call.name else product.name
    alone = call.output is product and set(call.inputs) >= set(product.sources)
    if alone and call.name and not list(call.module.children()):
        return call.name
    child = f"mul_{site.product}" if site.product else "mul"
    return f"{call.name}.{child}" if call.name else child
