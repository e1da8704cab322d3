"""Which function of one number some operations compute, a gate or an activation: by its values."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from senet.anatomy.graph import Node
from senet.nn.block import GATES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
}
_GRID = torch.linspace(-8, 8, 161)
_FAR = torch.tensor([-1e4, -100.0, 100.0, 1e4])
_EVERYWHERE = torch.cat((_GRID, _FAR))
_LARGEST_LIMIT = 1e3  # a function that goes beyond is not bounded
# Functions of one number besides the kinds "relu", "activation", "add", "mul" and "div".
_SCALAR = (
    *("sub", "sub_", "rsub", "__sub__", "__rsub__", "subtract", "neg", "negative", "__neg__"),
    *("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "pow", "__pow__", "reciprocal"),
    *("abs", "clip", "clip_", "clamp_min", "clamp_max", "hardshrink", "softsign", "logsigmoid"),
    *("__rtruediv__", "true_divide", "divide", "expit", "maximum", "minimum", "threshold", "erf"),
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
            if not is_scalar(node) or not source.reduced:
                break
            chain.append(node)
        elif not source.reduced:
            break
        node = source
    return node, chain[::-1]


def is_scalar(node: Node) -> bool:
    """Whether an operation maps each number for itself, with constants that are numbers."""
    if len(node.sources) != 1:
        return False
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
    start = chain[0].sources[0]
    everything = _computed(start, chain, _EVERYWHERE)
    bounded = bool(everything.isfinite().all()) and float(everything.abs().max()) < _LARGEST_LIMIT
    limits = None
    if bounded:
        low, high = (round(float(v), 4) + 0.0 for v in (everything.min(), everything.max()))
        limits = (low, high)
    known = ((name, function()) for name, function in GATES.items())
    return GateFunction(_named(chain, everything, known), limits)


def activation_after(node: Node) -> tuple[str, Node] | None:
    """The activation that alone reads a node: its name, and the node of its result.

    It may take several operations (x · sigmoid(x)), each of which maps each number for itself, with
    constants that are numbers.

    Returns:
        None where something else follows; else a key of `ACTIVATIONS` where it is one of them, by
        its values, or the names of its operations, the last one first.
    """
    inside = [node]
    end = None
    while True:
        users = {u.index: u for n in inside for u in n.users if u not in inside}
        closed = all(user in inside for n in inside[:-1] for user in n.users)
        if closed and len(inside) > 1:
            end = len(inside)
            if len(inside[-1].users) != 1 or not is_scalar(inside[-1].users[0]):
                break
        following = users[min(users)] if users else None
        if following is None or not _is_elementwise(following, inside):
            break
        inside.append(following)
    if end is None:
        return None
    steps = inside[1:end]
    values = _computed(node, steps, _EVERYWHERE)
    return _named(steps, values, ACTIVATIONS.items()), steps[-1]


def _is_elementwise(node: Node, inside: Sequence[Node]) -> bool:
    """Whether an operation reads nothing but these nodes and numbers."""
    if is_scalar(node):
        return True
    both = len(node.inputs) == 2 and all(n in inside for n in node.inputs)
    plain = node.kind in ("mul", "div", "add") or node.name in _SCALAR
    return both and plain and node.function is not None and node.shape == inside[0].shape


def _named(
    steps: Sequence[Node], values: Tensor, known: Iterable[tuple[str, Callable[[Tensor], Tensor]]]
) -> str:
    finite = values.isfinite() | (_EVERYWHERE.abs() <= 8)  # far away exponentials overflow
    for name, function in known:
        if torch.allclose(values[finite], function(_EVERYWHERE)[finite], atol=1e-5):
            return name
    return " of ".join(node.name.rstrip("_") for node in reversed(steps))


@torch.no_grad()
def _computed(start: Node, steps: Sequence[Node], grid: Tensor) -> Tensor:
    """What scalar operations make of some numbers in the place of their first input."""
    values, last = {start: grid}, grid

    def value(leaf: object) -> object:
        if not isinstance(leaf, Node):
            return leaf
        if leaf.moving:  # a view of the step before has its values
            return values.get(leaf, last).clone()
        assert leaf.tensor is not None
        return leaf.tensor.detach().reshape(()).to("cpu", torch.float32)

    for node in steps:
        assert node.function is not None
        args, kwargs = tree_map(value, (node.args, node.kwargs))
        values[node] = last = node.function(*args, **kwargs)
    return last
