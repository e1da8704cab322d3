"""SE blocks of any model, by what they compute.

An SE block is a product of a map with something that depends on a map only through a reduction
over all its positions (eq. 2 to 4 of arXiv 1709.01507, whatever the modules are called): squeeze,
a small program on (N,C), a gate function, and a factor (and a shift) on the map.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from senet.anatomy.example import attempt, guessed_arguments
from senet.anatomy.gate_function import gate_chain, gate_function, only_shapes
from senet.anatomy.graph import LAYERS, Node, Site, Trace
from senet.anatomy.occurrences import (
    Occurrence,
    channels_of,
    container,
    inline_name,
    is_block,
    moved_from,
    name_of,
    places_of,
    products,
)
from senet.anatomy.positions import REDUCTIONS
from senet.anatomy.recording import record
from senet.errors import UserError

_SQUEEZES = {"mean": "avg", "nanmean": "avg", "amax": "max"}
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
        layer = self.kind in LAYERS
        return f"{self.function} {self.inputs}→{self.outputs}" if layer else self.function


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
            others[inline_name(product)] = seen
    blocks: dict[str, Excitation] = {}
    stage, before = 1, None
    for name, occurrences in found.items():
        places = places_of(occurrences[0].map)
        if places != before:
            stage, before = stage + 1, places
        blocks[name] = _excitation(model, name, occurrences, stage)
    return Anatomy(blocks, others, dict(trace.unread), trace)


def _excitation(
    model: nn.Module, name: str, occurrences: list[Occurrence], stage: int
) -> Excitation:
    first = occurrences[0]
    call = container(first)
    module = call.module if is_block(call, first) else None
    _, chain = gate_chain(first.factor)
    if not first.squeezes:  # gates of each position
        chain = [node for node in first.program if not only_shapes(node)][-1:]
    function = gate_function(chain)
    layers = [node for node in first.program if node.kind in LAYERS]
    return Excitation(
        name=name,
        module=module,
        stage=stage,
        channels=channels_of(first.map),
        places=places_of(first.map),
        squeeze="+".join(dict.fromkeys(_squeeze(n) for n in first.squeezes)) or "none",
        squeezed=_described(_squeezed_map(first)),
        scales=_described(list(moved_from(first.map))[-1]),
        program=tuple(
            Step(
                node.name,
                node.kind,
                node.calls[-1].name,
                channels_of(node.sources[0]) if len(node.sources) == 1 else 0,
                channels_of(node),
            )
            for node in first.program
            if node not in chain and not only_shapes(node)
        ),
        gate=function.name,
        limits=function.limits,
        hidden=channels_of(layers[0]) if len(layers) > 1 else None,
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
        return list(moved_from(occurrence.map))[-1]
    node = occurrence.squeezes[0]
    while True:
        maps = [source for source in node.sources if source.positions]
        partly = node in occurrence.squeezes or node.name in REDUCTIONS or len(maps) == 1
        passed = only_shapes(node) or node.kind in ("mul", "div") or node.name in _MASKS
        if not maps or not (node in occurrence.squeezes or (partly and passed)):
            return node
        node = max(maps, key=channels_of)


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
