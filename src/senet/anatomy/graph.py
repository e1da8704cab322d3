"""What a model does in one forward pass: its operations, who feeds whom, in which module.

torch.fx cannot follow control flow, and what it gives has no shapes; recording one pass works for
any model, graph modules and exported programs among them. The functions that PyTorch is asked for
become nodes, and hooks tell in which module call each one happened.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Names of torch functions and Tensor methods, by what they do to a map.
_KINDS = {
    "conv": ("conv1d", "conv2d", "conv3d", "convolution", "_conv_forward"),
    "deconv": ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "linear": ("linear", "matmul", "__matmul__", "bmm", "addmm", "mm"),
    "norm": ("batch_norm", "group_norm", "instance_norm"),
    "norm_last": ("layer_norm", "rms_norm"),
    "add": ("add", "add_", "__add__", "__radd__", "__iadd__"),
    "mul": ("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"),
    "div": ("div", "div_", "__truediv__", "__itruediv__"),
    "cat": ("cat", "concat", "concatenate"),
    "dropout": (
        *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        *("feature_dropout", "feature_alpha_dropout"),
    ),
    "permute": ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "T", "mT", "t"),
    "reshape": ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"),
    "expand": ("expand", "expand_as", "broadcast_to", "repeat", "tile"),
    "same": (
        *("contiguous", "clone", "to", "_to_copy", "type", "float", "half", "type_as", "detach"),
        *("alias", "double", "bfloat16", "data", "lift_fresh_copy", "identity"),
    ),
    "part": ("__getitem__", "chunk", "split", "narrow", "unbind", "tensor_split", "select"),
    "relu": ("relu", "relu_"),
    "activation": (
        *("relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "gelu", "silu", "silu_"),
        *("hardswish", "hardswish_", "sigmoid", "sigmoid_", "hardsigmoid", "tanh", "mish", "elu"),
        *("prelu", "selu", "softplus", "clamp", "clamp_", "celu", "elu_", "mish_"),
    ),
    "average_pool": (
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
        *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean"),
    ),
    "max_pool": (
        *("max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "adaptive_max_pool2d"),
        *("max_pool1d_with_indices", "max_pool2d_with_indices", "amax"),
    ),
    "resize": ("interpolate", "upsample", "grid_sample"),
}
# Kinds of layers that mix channels.
LAYERS = ("conv", "linear")
KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


@dataclass(frozen=True)
class Site:
    """Where a product of two tensors happens; the same in each forward pass.

    Attributes:
        module: dotted name of the innermost module around it.
        call: which call of this module, from 0.
        product: which product in this call, from 0, those in submodules counted.
    """

    module: str
    call: int
    product: int


@dataclass(eq=False)
class Node:
    """A tensor that an operation gave.

    Attributes:
        index: position in the order of execution.
        kind: a key of the table above, "input", "parameter" (whatever does not depend on the
            input) or "other".
        name: name of the function.
        inputs: tensors it was made of, in the order of the arguments.
        shape: its shape.
        dtype: its dtype.
        calls: the module calls around the operation, outermost first.
        users: operations that read it.
        channel_dim: position of the channels, None where unknown.
        arguments: its arguments that are no tensors.
        function: what was called.
        args: its positional arguments, nodes in the place of tensors.
        kwargs: its other arguments, likewise.
        positions: dimensions that hold the positions of a map; () once they were reduced.
        reduced: whether it depends on maps only through a reduction over all their positions.
        site: where a product happens, see `Site`; None for anything else.
        seconds: how long the call took.
        stride: of a convolution, the largest; 1 otherwise.
        groups: of a convolution; 1 otherwise.
        is_output: whether the model returns it.
        tensor: the tensor itself, of a parameter or constant only.
    """

    index: int
    kind: str
    name: str
    inputs: tuple["Node", ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: tuple["Call", ...]
    users: list["Node"] = field(default_factory=list)
    channel_dim: int | None = None
    arguments: tuple[Any, ...] = ()
    stride: int = 1
    groups: int = 1
    is_output: bool = False
    tensor: Tensor | None = None
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    positions: tuple[int, ...] = ()
    reduced: bool = False
    site: "Site | None" = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        return f"{self.name or self.kind}_{self.index} {self.shape}"  # not the graph around it

    @property
    def moving(self) -> bool:
        """Whether it depends on the model's input."""
        return self.kind != "parameter"

    @property
    def sources(self) -> tuple["Node", ...]:
        """The inputs that depend on the model's input."""
        return tuple(node for node in self.inputs if node.moving)

    @property
    def is_map(self) -> bool:
        """Whether it can be a batch of feature maps: floating, three to five dimensions."""
        return self.dtype.is_floating_point and 3 <= len(self.shape) <= 5

    @property
    def channels(self) -> int:
        """Size of the channel dimension."""
        assert self.channel_dim is not None
        return self.shape[self.channel_dim]

    @property
    def places(self) -> tuple[int, ...]:
        """Sizes of the dimensions that are neither images nor channels."""
        return tuple(n for d, n in enumerate(self.shape) if d not in (0, self.channel_dim))

    def within(self, call: "Call") -> bool:
        """Whether it was computed inside that module call."""
        return call in self.calls


@dataclass(eq=False)
class Call:
    """A call of a module.

    Attributes:
        module: the module.
        name: its dotted name, "" for the model itself.
        inputs: tensors among its arguments.
        output: what it returned where that is one tensor.
        number: which call of this module, from 0.
        products: products of two tensors so far, those in submodules counted.
    """

    module: nn.Module
    name: str
    inputs: tuple[Node, ...] = ()
    output: Node | None = None
    number: int = 0
    products: int = 0

    def __repr__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


@dataclass
class Trace:
    """A recorded forward pass.

    Attributes:
        nodes: tensors in the order of execution.
        calls: module calls in the order of their end (inner before outer).
        result: what the model returned.
        unread: what could not be looked into, by name, with the reason.
    """

    nodes: list[Node]
    calls: list[Call]
    result: Any
    unread: dict[str, str] = field(default_factory=dict)

    def owners(self, node: Node) -> list[Call]:
        """Module calls that returned exactly this tensor, innermost first."""
        return [call for call in self.calls if call.output is node]

    def calls_of(self, module: nn.Module) -> list[Call]:
        """All calls of a module."""
        return [call for call in self.calls if call.module is module]

    def ancestors(self) -> list[int]:
        """By node, the set of nodes it was computed from (itself included) as a bit mask."""
        masks: list[int] = []
        for node in self.nodes:
            mask = 1 << node.index
            for source in node.sources:
                mask |= masks[source.index]
            masks.append(mask)
        return masks


def function_name(function: Any) -> str:
    """Name of what was called, whichever form it has: `mul` also for `aten.mul.Tensor`."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":  # a property such as x.mT
        return str(getattr(function.__self__, "__name__", name))
    return name.partition(".")[0]


def is_product(function: Any, tensors: list[Tensor]) -> bool:
    """Whether this call multiplies two tensors elementwise."""
    return len(tensors) >= 2 and KIND_OF.get(function_name(function)) == "mul"


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of the call that made a node, by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default
