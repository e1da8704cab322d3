"""A traced model whose graph is being rewritten: looking at its nodes and replacing them."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from senet.inference.modules import AsItIs, FusedConv, Pointwise, ends_openly
from senet.inference.rewrites.calls import in_places
from senet.inference.rewrites.tracing import FAILURES, Tracer, of_another_size
from senet.inference.shapes import outline, traced_results
from senet.nn.hooks import without_hooks

# Attributes of a tensor that tell nothing of its numbers.
_ABOUT = ("shape", "ndim", "dtype", "device", "is_cuda")
# What may give its argument's own memory, or a part of it.
_VIEWS = (
    *("getitem", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit"),
    *("narrow", "select", "unbind", "unfold", "diagonal", "view", "view_as", "reshape"),
    *("reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "transpose"),
    *("swapaxes", "swapdims", "permute", "movedim", "moveaxis", "expand", "expand_as"),
    *("broadcast_to", "detach", "contiguous", "to", "type", "type_as", "float", "double", "half"),
    *("bfloat16", "cpu", "cuda", "real", "t", "requires_grad"),
)
_SEEN_ANEW = ("T", "mT", "H", "mH", "data", "real")
_VIEWING = (nn.Flatten, nn.Unflatten, nn.Identity)
# Operations in place, and those that give the same anew.
_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class Editor:
    """A traced model and what is done to it.

    Args:
        model: model in evaluation mode; its parameters are read, not changed.
        example: an input of it, which tells the shapes; without it less can be rewritten.
        given: names of the arguments that the model is called with; see `Tracer`.

    Attributes:
        graph: the graph.
        module: the graph as a module.
        closed: modules that could not be followed, and why.
        fused: for each rewrite the module that it starts from, and what was done.
        left: SE blocks that stay as they are, and why.
        gated: modules with a product of a map and gates that was rewritten, once for each product.
        dims: spatial dimensions of the input.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | None = None,
        given: Collection[str] | None = None,
    ) -> None:
        tracer = Tracer(example, given)
        self.graph = tracer.trace(model)
        in_places(self.graph, model)
        for node in self.graph.nodes:
            node.type = None  # annotations of shapes cannot be pickled
        self.module = fx.GraphModule(model, self.graph)
        self.closed = tracer.closed
        self.fused: list[tuple[str, str]] = []
        self.left = [(name, self.closed[name]) for name in sorted(tracer.hooked)]
        for name in tracer.hooked:
            self.module.set_submodule(name, AsItIs(self.module.get_submodule(name)))
        for name in tracer.bare:
            if any(name.startswith(f"{around}.") for around in self.closed):
                raise fx.proxy.TraceError(f"{name} with its hooks is called from two places")
            self.module.set_submodule(name, without_hooks(self.module.get_submodule(name)))
        self.gated: list[str] = []
        self.scopes = tracer.scopes
        self.origin: dict[fx.Node, str] = {}
        self.results: dict[fx.Node, Any] = {}
        self.dims = 2 if example is None else example.ndim - 2
        self._example = example
        if example is not None:
            self.results = traced_results(self.module, outline(self.module), example)

    def called(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(str(node.target))
        return None

    def operation(self, node: fx.Node) -> str:
        """Name of a function or method, without a mark of working in place; "" of anything else."""
        if node.op == "call_function":
            name = str(getattr(node.target, "__name__", ""))
            in_place = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
            return in_place.get(name, {"truediv": "div"}.get(name, name.rstrip("_")))
        return str(node.target).rstrip("_") if node.op == "call_method" else ""

    def argument(self, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """An argument of a call, by position or by name."""
        if name in node.kwargs:
            return node.kwargs[name]
        return node.args[position] if len(node.args) > position else default

    def shape(self, node: Any) -> tuple[int, ...] | None:
        """The shape that a node has for the example; None where it is unknown, or no tensor."""
        result = self.results.get(node)
        return tuple(result.shape) if isinstance(result, Tensor) else None

    def shapes_elsewhere(self, *nodes: fx.Node) -> tuple[tuple[int, ...], ...] | None:
        """Shapes of tensors for images of another number and size; None where they are unknown."""
        if self._example is None:
            return None
        x, empty = self._example.to("meta"), outline(self.module)
        for other in (of_another_size(x), torch.cat([x, x[:1]])):  # it may want that very size
            try:
                results = traced_results(self.module, empty, other)
            except FAILURES:
                continue
            found = [results[node] for node in nodes]
            known = all(isinstance(result, Tensor) for result in found)
            return tuple(tuple(result.shape) for result in found) if known else None
        return None

    def in_floats(self, node: Any, source: Any) -> bool:
        """Whether a node gives floating numbers of the type that it reads from `source`.

        Products of masks or whole numbers may be of another type, and never are a kernel's. Without
        an example it is taken for granted.
        """
        if not self.results:
            return True
        types = {getattr(self.results.get(each), "dtype", None) for each in (node, source)}
        return len(types) == 1 and all(t is not None and t.is_floating_point for t in types)

    def single_use(self, node: fx.Node) -> bool:
        """Whether one node alone reads this one."""
        return len(node.users) == 1

    def memory_of(self, node: fx.Node) -> fx.Node:
        """The node whose memory another one may give, in parts or as a whole."""
        while self.is_view(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return node

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node may give its first argument's own memory, or parts of it."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        name = self.operation(node)
        anew = name == "getattr" and node.args[1] in _SEEN_ANEW
        return name in _VIEWS or anew or type(self.called(node)) in _VIEWING

    def may_move(self, node: fx.Node, at: fx.Node) -> bool:
        """Whether nothing between a node and a later one writes into what it reads."""
        read = {self.memory_of(source) for source in node.all_input_nodes}
        between = node.next
        while between is not at:
            if self.writes(between) and read & set(map(self.memory_of, between.all_input_nodes)):
                return False
            between = between.next
        return True

    def writes(self, node: fx.Node) -> bool:
        """Whether a node may write into a tensor that it is given."""
        name = str(getattr(node.target, "__name__", node.target))
        if node.op in ("call_function", "call_method"):
            own = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
            return own or "out" in node.kwargs or without_writing(node) is not None
        return node.op == "call_module" and str(node.target) in self.closed

    def reads_shape(self, node: fx.Node) -> bool:
        """Whether a node reads nothing but sizes, type or device of a tensor."""
        name = self.operation(node)
        return (name == "getattr" and node.args[1] in _ABOUT) or (
            node.op == "call_method" and name in ("size", "dim", "numel", "ndimension")
        )

    def constant(self, node: Any) -> Tensor | None:
        """The parameter or buffer that a node stands for."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value: Any = self.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value if isinstance(value, Tensor) else None

    def insert(self, module: nn.Module, at: fx.Node, args: tuple[Any, ...], origin: str) -> fx.Node:
        """A call of a new module in front of node `at`."""
        name = "_".join(["fused", *origin.split(".")])
        while hasattr(self.module, name):
            name += "_"
        self.module.add_submodule(name, module)
        with self.graph.inserting_before(at):
            node = self.graph.call_module(name, args)
        self.origin[node] = origin
        self.scopes[node] = self.scopes.get(at, "")
        return node

    def insert_in_place_of(
        self, node: fx.Node, module: nn.Module, args: tuple[Any, ...]
    ) -> fx.Node:
        """A call of a new module instead of node `node`, which goes."""
        new = self.insert(module, node, args, self.name_of(node))
        self.replace(node, new)
        return new

    def move(self, node: fx.Node, at: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """The call of `node` with other arguments in place of node `at`; both nodes go."""
        with self.graph.inserting_before(at):
            new = self.graph.call_module(str(node.target), args)
        self.origin[new] = self.origin[node]
        self.scopes[new] = self.scopes.get(node, "")
        self.replace(at, new)
        self.graph.erase_node(node)
        return new

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` stand for `old`, which goes."""
        if old in self.results:
            self.results[new] = self.results[old]
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def name_of(self, node: fx.Node) -> str:
        """What the report calls a node: its module, or its operation in the module around it."""
        if node in self.origin:
            return self.origin[node]
        if node.op == "call_module":
            return str(node.target)
        scope = self.scopes.get(node, "")
        return f"{scope}.{node.name}" if scope else node.name

    def say(self, node: fx.Node, what: str) -> None:
        """Note a rewrite for the report."""
        self.fused.append((self.name_of(node), what))

    def takes_more(self, node: Any) -> FusedConv | Pointwise | None:
        """The module of a node that can take in what follows: nobody else reads what it gives.

        Its shape may be read: that stays.
        """
        module = self.called(node)
        if not isinstance(module, FusedConv | Pointwise) or not ends_openly(module):
            return None
        readers = [user for user in node.users if not self.reads_shape(user)]
        return module if len(readers) == 1 else None


def plain(module: nn.Module) -> bool:
    """Whether a layer computes what its name says: PyTorch's own class, not one derived from it.

    Parametrized layers are of a class of their own, but differ in where the weights come from only.
    """
    kind: type = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return kind in (*convolutions, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def without_writing(node: fx.Node) -> Any:
    """The function or method that gives what this one writes into its first argument."""
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        if name.endswith("_") and not name.endswith("__"):
            known = (getattr(home, name[:-1], None) for home in (F, torch))
            return next((function for function in known if function is not None), None)
        return _IN_PLACE.get(node.target)
    if node.op == "call_method":
        name = str(node.target)
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return name[:-1] if writes and hasattr(Tensor, name[:-1]) else None
    return None


def without_gradient(value: Tensor) -> nn.Parameter:
    """A parameter of these numbers."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), False)
