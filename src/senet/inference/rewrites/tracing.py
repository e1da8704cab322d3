"""A model as a torch.fx graph, free of batch and image size."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from senet.inference.shapes import Growing
from senet.nn.block import SqueezeExcitation
from senet.nn.hooks import has_forward_hooks, scaling_block
from senet.nn.padded_shortcut import PaddedShortcut

# What code raises that wants numbers where a symbolic trace has none.
FAILURES = (
    *(fx.proxy.TraceError, TypeError, NotImplementedError, ValueError, RuntimeError),
    *(AttributeError, IndexError, KeyError, AssertionError, NameError, ArithmeticError),
)


# Functions of numbers.
_OF_NUMBERS = (
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.truediv),
    *(operator.not_, operator.and_, operator.or_),
)


def of_another_size(x: Tensor) -> Tensor:
    """Images without data of another number and size, which networks that reduce theirs take."""
    larger = [factor * size + 32 for factor, size in enumerate(x.shape[2:], 2)]
    return x.new_empty(len(x) + 1, *x.shape[1:2], *larger, device="meta")


def reason_of(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Proxy(fx.Proxy):
    """One with a length where that is known, and that notes what is written into tensors."""

    def __len__(self) -> int:
        assert isinstance(self.tracer, Tracer)
        length = self.tracer.length(self.node)
        return super().__len__() if length is None else length

    def _in_place(self, other: Any, written: Callable[..., Any], plain: Callable[..., Any]) -> Any:
        # Numbers are no other ones after `+=`, tensors are: other names of them see it.
        assert isinstance(self.tracer, Tracer)
        function = written if self.tracer.is_tensor(self.node) else plain
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(other, operator.iadd, operator.add)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(other, operator.isub, operator.sub)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(other, operator.imul, operator.mul)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(other, operator.itruediv, operator.truediv)


class Tracer(fx.Tracer):
    """Follows a model down to PyTorch's own modules and SE blocks.

    A module that cannot be followed is called as a whole. Loops over shapes and parts, and branches
    that compare sizes, are followed where they are the same for images of another number and size:
    then they depend on dimensions and channels. What a model returns keeps its kind: fx itself
    takes an OrderedDict, or a dataclass that is one, for a plain dict, and returns its own
    immutable lists inside of named tuples.

    Args:
        example: an input.
        given: names of the arguments that the model is called with; others keep their defaults.
            None: those that have no default.

    Attributes:
        closed: modules that could not be followed, and why.
        scopes: for each node the dotted name of the innermost module around it.
        hooked: layers that are called as a whole, because hooks look at them.
        bare: layers whose hooks have become nodes.
    """

    def __init__(self, example: Tensor | None = None, given: Collection[str] | None = None) -> None:
        super().__init__()
        self._named = given
        self.hooked: set[str] = set()
        self.bare: set[str] = set()
        self._examples = () if example is None else (example.to("meta"), of_another_size(example))
        self._results: tuple[Growing, ...] = ()
        self.closed: dict[str, str] = {}
        self.scopes: dict[fx.Node, str] = {}

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The function that is followed, and what it is called with: what has a default keeps it.

        Raises:
            TypeError: it wants arguments by name alone, or none at all.
        """
        assert isinstance(self.root, nn.Module)
        forward: Callable[..., Any] = self.root.forward  # its own, where one was set
        given: list[inspect.Parameter] = []
        for each in inspect.signature(forward).parameters.values():
            wanted = each.default is each.empty if self._named is None else each.name in self._named
            if each.kind is each.VAR_KEYWORD or not wanted:
                continue
            if each.kind is each.VAR_POSITIONAL and given:
                continue
            if each.kind is each.KEYWORD_ONLY:
                raise TypeError(f"it is called with {each.name} by name")
            given.append(each)
        return forward, [self.create_proxy("placeholder", each.name, (), {}) for each in given]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node, of which it is kept in which module it stands."""
        node = super().create_node(*args, **kwargs)
        self.scopes[node] = self.scope.module_path
        return node

    def create_arg(self, a: Any) -> Any:
        """What stands in the graph for an argument."""
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self.create_node("call_function", type(a), tuple(map(self.create_arg, a)), {})
        kind: type = type(a)
        plain_dicts = (dict, fx.immutable_collections.immutable_dict)
        if not isinstance(a, dict) or kind in plain_dicts:
            return super().create_arg(a)
        if dataclasses.is_dataclass(kind):
            given = {f.name: getattr(a, f.name) for f in dataclasses.fields(kind) if f.init}
            kwargs = {name: self.create_arg(value) for name, value in given.items()}
            return self.create_node("call_function", kind, (), kwargs)
        return self.create_node("call_function", kind, (super().create_arg(dict(a)),), {})

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a split whose number is said: fx itself cannot tell how many there are."""
        node = obj.node
        name = str(getattr(node.target, "__name__", node.target))
        said = (*node.args[1:], *node.kwargs.values())
        number = said[0] if said else None
        if name in ("split", "split_with_sizes") and isinstance(number, list | tuple):
            return map(partial(operator.getitem, obj), range(len(number)))
        if name in ("chunk", "tensor_split") and isinstance(number, int):
            return map(partial(operator.getitem, obj), range(number))
        length = self.length(node)
        if length is not None:
            return map(partial(operator.getitem, obj), range(length))
        return super().iter(obj)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What the model's code has in its hands for a node."""
        return _Proxy(node, self)

    def length(self, node: fx.Node) -> int | None:
        """How many parts a node gives, if that follows from dimensions and channels alone."""
        lengths = {len(each) for each in self._given(node) if isinstance(each, list | tuple)}
        return lengths.pop() if len(lengths) == 1 else None

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node is known to give a tensor."""
        if node.op == "call_module":
            return True
        for results in self._growing():
            try:
                return isinstance(results.of(node), Tensor)
            except FAILURES:
                continue
        return False

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Which way a branch goes that compares sizes."""
        if self._is_fixed(obj.node):
            return bool(self._given(obj.node)[0])
        return super().to_bool(obj)

    def _given(self, node: fx.Node) -> tuple[Any, ...]:
        """What a node gives for the example, and for another one; nothing where that is unknown."""
        try:
            return tuple(results.of(node) for results in self._growing())
        except FAILURES:
            return ()

    def _growing(self) -> tuple[Growing, ...]:
        if not self._results:
            self._results = tuple(Growing(self.root, self.graph, x) for x in self._examples)
        return self._results

    def _is_fixed(self, node: Any) -> bool:
        """Whether a node gives a number that follows from dimensions and channels alone."""
        if not isinstance(node, fx.Node):
            return isinstance(node, int | float)
        if node.target in _OF_NUMBERS:
            return all(map(self._is_fixed, node.args))
        name = node.args[1] if node.target is getattr else node.target
        sizes = name in ("ndim", "dim", "size") or node.target is operator.getitem
        found = self._given(node) if sizes else ()
        return bool(found) and isinstance(found[0], int) and found[0] == found[1]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph calls m and does not look into it."""
        if "forward" in vars(m):  # it does not compute what its class does
            return False
        own = type(m) in (SqueezeExcitation, PaddedShortcut)
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What a module gives: the graph of its inside, or a call of it where that fails."""
        try:
            name = self.path_of_module(m)
        except NameError:  # made in a forward pass: it has no name to be called by
            return forward(*args, **kwargs)
        if has_forward_hooks(m) and name not in self.closed:
            if scaling_block(m) is None or m._forward_pre_hooks:
                self.closed[name] = "hooks look at what it gives"
            if self.is_leaf_module(m, name):
                (self.hooked if name in self.closed else self.bare).add(name)
                result = self.create_proxy("call_module", name, args, kwargs)
                if name in self.closed:
                    return result
                for hook in m._forward_hooks.values():
                    result = hook(m, args, result)
                return result
        if name not in self.closed:
            last, depth = next(iter(reversed(self.graph.nodes))), len(self.module_stack)
            try:
                return super().call_module(m, forward, args, kwargs)
            except FAILURES as error:
                self.closed[name] = reason_of(error)
                while len(self.module_stack) > depth:
                    self.module_stack.popitem()
                self._forget_after(last)
        return self.create_proxy("call_module", name, args, kwargs)

    def _forget_after(self, last: fx.Node) -> None:
        """Take back the nodes behind `last`; parameters stay, fx keeps them by name."""
        for node in list(reversed(self.graph.nodes)):
            if node is last:
                return
            if node.op != "get_attr":
                self.graph.erase_node(node)
