"""The SE blocks of a model as rows of a table: what they are and what they cost."""

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from senet.anatomy.excitations import Anatomy, Excitation, read, trace_of
from senet.anatomy.graph import Node, Trace
from senet.anatomy.occurrences import Occurrence

_PRODUCTS = ("conv", "deconv", "linear")
_LAST_IS_SUMMED = ("linear", "matmul", "__matmul__", "bmm", "mm")


@dataclass(frozen=True)
class Description:
    """One SE block.

    Attributes:
        name: of the block, as `Excitation.name`.
        stage: runs of blocks whose maps have one size share a number, from 2 on.
        scales: function and module whose map is scaled.
        channels: C.
        places: size of the map.
        squeeze: kind of the reduction; followed by the map where it is not the one that is scaled.
        program: the operations between squeeze and gate function.
        gate: name of the gate function.
        limits: smallest and largest gate; None for an unbounded one.
        shift: whether something of the same squeeze is added, too.
        calls: how often it runs in a forward pass.
        parameters: number of its parameters.
        multiply_adds: of one image, in all its calls.
        multiply_adds_share: of those of the whole model's convolutions and matrix products.
        time_share: of the time of the whole model's operations, run one by one; None where it was
            not measured.
    """

    name: str
    stage: int
    scales: str
    channels: int
    places: tuple[int, ...]
    squeeze: str
    program: str
    gate: str
    limits: tuple[float, float] | None
    shift: bool
    calls: int
    parameters: int
    multiply_adds: int
    multiply_adds_share: float
    time_share: float | None


def describe(
    model: nn.Module, example_input: Any = None, *, runs: int = 0
) -> tuple[Description, ...]:
    """The SE blocks of a model, in the order of execution.

    Args:
        model: any module, see `senet.anatomy.excitations`.
        example_input: likewise.
        runs: how often the model is run to time its operations; 0 measures nothing. Of each
            operation the shortest time counts.

    Raises:
        UserError: as for `excitations`.
    """
    traces = [trace_of(model, example_input) for _ in range(max(1, runs + bool(runs)))]
    return rows(read(model, traces[0]), traces[1:])


def rows(seen: Anatomy, timed: list[Trace]) -> tuple[Description, ...]:
    """Descriptions of all SE blocks that were found.

    Args:
        seen: what was found.
        timed: further forward passes of the same model, whose times count; none: no times.
    """
    nodes = seen.trace.nodes
    times = [
        min(node.seconds for node in same) for same in zip(*(t.nodes for t in timed), strict=True)
    ]
    everything = sum(multiply_adds(node) for node in nodes)
    return tuple(_row(e, everything, times) for e in seen.excitations.values())


def _row(e: Excitation, everything: int, times: list[float]) -> Description:
    first = e.occurrences[0]
    images = max(first.map.shape[0], 1)
    nodes = {node for occurrence in e.occurrences for node in _own(occurrence)}
    adds = sum(multiply_adds(node) for node in nodes)
    total = sum(times)
    return Description(
        name=e.name,
        stage=e.stage,
        scales=e.scales,
        channels=e.channels,
        places=e.places,
        squeeze=e.squeeze if e.squeezed == e.scales else f"{e.squeeze} of {e.squeezed}",
        program=", ".join(map(str, e.program)),
        gate=e.gate,
        limits=e.limits,
        shift=e.shift,
        calls=len(e.occurrences),
        parameters=e.parameters,
        multiply_adds=adds // images,
        multiply_adds_share=adds / everything if everything else 0.0,
        time_share=sum(times[node.index] for node in nodes) / total if total else None,
    )


def _own(occurrence: Occurrence) -> set[Node]:
    return {*occurrence.inside, *occurrence.squeezes, *occurrence.program, occurrence.product}


def multiply_adds(node: Node) -> int:
    """Multiply-adds of a convolution or matrix product, of all images; 0 for anything else."""
    if len(node.inputs) < 2:
        return 0
    count = prod(node.shape)
    first, second = node.inputs[:2]
    if node.name in _LAST_IS_SUMMED:
        return count * first.shape[-1]
    if node.name in ("addmm", "baddbmm"):
        return count * second.shape[-1]
    if node.name == "scaled_dot_product_attention":  # queries by keys, then by values
        return prod(first.shape) * second.shape[-2] + count * second.shape[-2]
    if node.name == "einsum" and isinstance(node.args[0], str):
        terms = node.args[0].replace(" ", "").partition("->")[0].split(",")
        sizes = {
            letter: size
            for term, operand in zip(terms, node.inputs, strict=False)
            for letter, size in zip(term, operand.shape, strict=False)
        }
        return prod(sizes.values()) if len(node.inputs) == 2 else 0
    if node.kind not in _PRODUCTS:
        return 0
    # Of a transposed convolution each number of the input is spread over the kernel.
    numbers = prod(first.shape) if node.kind == "deconv" else count
    return numbers * prod(second.shape[1:])
