"""The weights of a layer in a graph, whichever module or function it is written with."""

from dataclasses import dataclass

from torch import Tensor, nn

from senet.anatomy.graph import Node, Trace, argument


@dataclass(frozen=True)
class Layer:
    """A convolution, linear layer or norm whose weights are parameters and serve it alone.

    Attributes:
        weight: its first parameter.
        bias: None where it has none.
        mean: running mean of a batch norm; None for anything else.
        variance: running variance, likewise.
    """

    weight: nn.Parameter
    bias: Tensor | None
    mean: Tensor | None = None
    variance: Tensor | None = None


# Positions of weight, bias, mean and variance among the arguments; aten orders batch norms anew.
_PLACES = {
    "batch_norm": (3, 4, 1, 2),
    "aten.batch_norm": (1, 2, 3, 4),
    "group_norm": (2, 3),
    "layer_norm": (2, 3),
    "instance_norm": (3, 4),
    "linear": (1, 2),
}
_NAMES = ("weight", "bias", "running_mean", "running_var")


def layer_of(trace: Trace, node: Node) -> Layer | None:
    """The layer that a node is the output of; None where it is none or shares its weights."""
    aten = "aten." if "aten" in str(getattr(node.function, "__module__", "")) else ""
    places = _PLACES.get(aten + node.name) or _PLACES.get(node.name)
    if node.kind == "conv":
        places = (1, 2)
    if places is None or not node.args or not isinstance(node.args[0], Node):
        return None
    values = [
        found.tensor if isinstance(found := argument(node, at, name), Node) else None
        for at, name in zip(places, _NAMES, strict=False)
    ]
    weight, bias = values[:2]
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
        return None  # none, or computed from parameters
    readers = [n for n in trace.nodes if any(i.tensor is weight for i in n.inputs)]
    return Layer(weight, *values[1:]) if readers == [node] else None
