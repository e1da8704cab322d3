"""Which function of one number a chain of operations computes: known by its values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from senet.anatomy.graph import Node
from senet.nn.block import GATES

_GRID = torch.linspace(-8, 8, 161)
_FAR = torch.tensor([-1e4, -100.0, 100.0, 1e4])
_LARGEST_LIMIT = 1e3  # a function that goes beyond is not bounded
# Functions of one number besides the kinds "relu", "activation", "add", "mul" and "div".
_SCALAR = (
    *("sub", "sub_", "rsub", "__sub__", "__rsub__", "subtract", "neg", "negative", "__neg__"),
    *("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "pow", "__pow__", "reciprocal"),
    *("abs", "clip", "clip_", "clamp_min", "clamp_max", "hardshrink", "softsign", "logsigmoid"),
    *("__rtruediv__", "true_divide", "divide", "expit", "maximum", "minimum", "threshold"),
)
_SHAPING = ("permute", "reshape", "same", "expand", "part", "resize", "dropout")


@dataclass(frozen=True)
class GateFunction:
    """The function that makes gates of logits.

    Attributes:
        name: a key of `senet.nn.block.GATES` where it is one of them, by its values; "identity"
            for none; else the names of its operations, the last one first.
        limits: smallest and largest value; None where it is unbounded.
    """

    name: str
    limits: tuple[float, float] | None


def only_shapes(node: Node) -> bool:
    """Whether an operation moves numbers and leaves their values.

    Resizing does so only to what is the same at all positions.
    """
    return node.kind in _SHAPING and (node.kind != "resize" or node.reduced)


def gate_chain(factor: Node) -> tuple[Node, list[Node]]:
    """The scalar operations that a factor ends with, in their order, and the node they begin from.

    A scalar operation maps each number for itself, with constants that are numbers.
    """
    chain: list[Node] = []
    node = factor
    while len(node.sources) == 1 and node.reduced:
        source = node.sources[0]
        if not only_shapes(node):
            if not _is_scalar(node) or not source.reduced:
                break
            chain.append(node)
        elif not source.reduced:
            break
        node = source
    return node, chain[::-1]


def _is_scalar(node: Node) -> bool:
    constants = [n for n in node.inputs if not n.moving]
    return (
        (node.kind in ("relu", "activation", "mul", "div", "add") or node.name in _SCALAR)
        and node.shape == node.sources[0].shape
        and node.function is not None
        and node.inputs.count(node.sources[0]) == 1
        and all(n.tensor is not None and n.tensor.numel() == 1 for n in constants)
    )


def gate_function(chain: Sequence[Node]) -> GateFunction:
    """The function that a chain of scalar operations computes."""
    if not chain:
        return GateFunction("identity", None)
    values = _computed(chain, _GRID)
    ends = _computed(chain, _FAR)
    everything = torch.cat((values, ends))
    bounded = bool(everything.isfinite().all()) and float(everything.abs().max()) < _LARGEST_LIMIT
    limits = None
    if bounded:
        low, high = (round(float(v), 4) + 0.0 for v in (everything.min(), everything.max()))
        limits = (low, high)
    for name, function in GATES.items():
        if torch.allclose(values, function()(_GRID), atol=1e-5):
            return GateFunction(name, limits)
    return GateFunction(" of ".join(node.name.rstrip("_") for node in reversed(chain)), limits)


@torch.no_grad()
def _computed(chain: Sequence[Node], grid: Tensor) -> Tensor:
    x = grid.clone()
    for node in chain:
        source = node.sources[0]

        def value(leaf: object, source: Node = source, x: Tensor = x) -> object:
            if leaf is source:
                return x
            if isinstance(leaf, Node):
                assert leaf.tensor is not None
                return leaf.tensor.detach().reshape(()).to("cpu", torch.float32)
            return leaf

        assert node.function is not None
        args, kwargs = tree_map(value, (node.args, node.kwargs))
        x = node.function(*args, **kwargs)
    return x
