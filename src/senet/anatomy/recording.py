"""Recording one run of a model as a graph.

The functions that PyTorch is asked for become nodes, and hooks tell in which module call each one
happened.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from senet.anatomy.graph import (
    KIND_OF,
    Call,
    Node,
    Site,
    Trace,
    argument,
    function_name,
    is_product,
)
from senet.anatomy.positions import moved_order, reads_positions
from senet.nn.hooks import without_remark

# Methods that may give back the very tensor they got.
_NOTHING = ("to", "contiguous", "type", "float", "type_as", "requires_grad_")
# What takes nothing but the shape or dtype of its second tensor.
_LIKE_SECOND = ("expand_as", "view_as", "reshape_as", "type_as")
# What takes nothing but shape, dtype and device of its tensor: its result is a constant.
_SHAPED_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")


class _Recorder(TorchFunctionMode):
    """Turns what PyTorch is asked for into nodes."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        leaves = tree_leaves(arguments)
        self.synchronize = any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves)
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.counts: dict[str, int] = {}
        self.unread: dict[str, str] = {}
        # Nodes by id of the tensor; `alive` keeps ids from being used again.
        self.known: dict[int, Node] = {}
        self.alive: list[Tensor] = []
        self.constants: dict[int, Node] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        began = time.perf_counter()
        result = func(*args, **kwargs)
        if self.synchronize:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        name = function_name(func)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name in _SHAPED_LIKE or name.startswith("new_"):
            self.node(result)
            return result
        if name in _LIKE_SECOND:
            tensors = tensors[:1]
        if args and isinstance(args[0], Tensor) and _writes(name):
            written = self.add(args[0], name, tensors, func, args, kwargs)
            if written is not None:
                written.seconds = seconds
            base = args[0]._base
            if base is not None and not self.node(base).moving:  # a batch that images go into
                self.add(base, name, [base, *tensors], func, (base, *args), kwargs)
            return result
        # A property such as x.shape gives no tensor and leaves no node.
        for output in tree_leaves(result):
            if isinstance(output, Tensor):
                if name in _NOTHING and any(output is tensor for tensor in tensors):
                    continue  # nothing happened
                made = self.add(output, name, tensors, func, args, kwargs)
                if made is not None:
                    made.seconds, seconds = seconds, 0.0  # once for several results
        return result

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one that no operation made is a parameter or a constant."""
        key = id(tensor)
        if key in self.known:
            return self.known[key]
        if key not in self.constants:
            self.alive.append(tensor)
            self.constants[key] = Node(
                -1, "parameter", "", (), tuple(tensor.shape), tensor.dtype, (), tensor=tensor
            )
        return self.constants[key]

    def add(
        self,
        output: Tensor,
        name: str,
        tensors: list[Tensor],
        function: Any = None,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
        kind: str | None = None,
    ) -> Node | None:
        """The node of a result; None for one that does not depend on the input."""
        inputs = tuple(self.node(tensor) for tensor in tensors)
        if kind is None and not any(node.moving for node in inputs):
            self.node(output)  # a function of parameters only, such as a standardised weight
            return None
        args, kwargs = tree_map(
            lambda leaf: self.node(leaf) if isinstance(leaf, Tensor) else leaf,
            (tuple(args), dict(kwargs or {})),
        )
        node = Node(
            index=len(self.nodes),
            kind=kind or KIND_OF.get(name, "other"),
            name=name,
            inputs=inputs,
            shape=tuple(output.shape),
            dtype=output.dtype,
            calls=tuple(self.stack),
            arguments=tuple(
                leaf for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, Node)
            ),
            function=function,
            args=args,
            kwargs=kwargs,
        )
        if node.kind in ("conv", "deconv"):
            node.stride = _largest(argument(node, 3, "stride", 1))
            at = 8 if name == "convolution" else 6
            node.groups = int(argument(node, at, "groups", 1)) if node.kind == "conv" else 1
        node.channel_dim = _channel_dim(node)
        node.positions, node.reduced = reads_positions(node)
        if is_product(function, tensors) and self.stack:
            inner = self.stack[-1]
            node.site = Site(inner.name, inner.number, inner.products)
            for call in self.stack:
                call.products += 1
        for source in {id(n): n for n in node.sources}.values():
            source.users.append(node)
        self.nodes.append(node)
        self.known[id(output)] = node
        self.alive.append(output)
        return node

    def enter(self, module: nn.Module, name: str, arguments: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        inputs = tuple(self.node(tensor) for tensor in tensors)
        self.stack.append(Call(module, name, inputs, number=number))

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        call = self.stack.pop()
        assert call.module is module
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            seen = id(tensor) in self.known or id(tensor) in self.constants
            if not seen and any(node.moving for node in call.inputs):
                # Made out of sight, by a scripted function for instance.
                why = f"{type(module).__name__} computes in code that cannot be followed"
                self.unread.setdefault(call.name, why)
                sources = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
                self.stack.append(call)
                self.add(tensor, type(module).__name__, sources)
                self.stack.pop()
        if isinstance(output, Tensor):
            call.output = self.known.get(id(output))
        self.calls.append(call)


def _writes(name: str) -> bool:
    """Whether a function changes its first tensor and gives nothing new."""
    inplace = name.endswith("_") and not name.startswith("_") and name not in _NOTHING
    return name == "__setitem__" or inplace


def _largest(value: Any) -> int:
    return int(max(value)) if isinstance(value, (tuple, list)) else int(value)


def _channel_dim(node: Node) -> int | None:
    """Where the channels of a new node stand, from what it does and where they stood before."""
    if node.kind in ("conv", "deconv", "norm", "input"):
        return 1
    if node.kind in ("linear", "norm_last"):
        return len(node.shape) - 1
    source = next((n for n in node.sources if len(n.shape) == len(node.shape)), None)
    before = source.channel_dim if source is not None else None
    if source is None or before is None:
        return _restored(node)
    if node.kind == "permute":
        return _moved(node, before)
    if node.kind == "reshape" and node.shape[before] != source.shape[before]:
        return None
    return before


def _restored(node: Node) -> int | None:
    """The channels of a view that undoes the views before it, as a channel shuffle does."""
    source = node
    while source.kind in ("reshape", "permute", "same") and len(source.sources) == 1:
        source = source.sources[0]
        if source.channel_dim is not None:
            return source.channel_dim if source.shape == node.shape else None
    return None


def _moved(node: Node, before: int) -> int | None:
    if node.name in ("movedim", "moveaxis"):
        return moved_order(node, len(node.shape)).index(before)
    numbers = [leaf for leaf in tree_leaves((node.args[1:], node.kwargs)) if isinstance(leaf, int)]
    rank = len(node.shape)
    numbers = [number % rank for number in numbers]
    if node.name == "permute" and len(numbers) == rank:
        return numbers.index(before)
    if len(numbers) == 2 and node.name in ("transpose", "swapaxes"):
        return {numbers[0]: numbers[1], numbers[1]: numbers[0]}.get(before, before)
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: no random numbers drawn, no statistics changed."""
    with _in_mode(model, training=False):
        yield


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = training  # not eval(), which exported programs refuse
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


def _eager(model: nn.Module) -> Any:
    """A context in which compiled parts of a model run as they are written."""
    compiled = any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """The model's output in evaluation mode, without gradients; its mode is kept."""
    with evaluating(model), torch.no_grad(), without_remark():
        return model(*arguments)


def record(model: nn.Module, arguments: tuple[Any, ...], *, training: bool = False) -> Trace:
    """Run the model once, in evaluation mode and without gradients, and record what it does.

    Args:
        model: any module; its mode and hooks are as before afterwards, and its statistics.
        arguments: what it is called with.
        training: run it in training mode instead, in which statistics change.

    Raises:
        Exception: whatever the model raises.
    """
    recorder = _Recorder(arguments)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            # Its parent sees what it returns.
            recorder.unread[name] = "TorchScript: keep the network it was made from"
            continue
        handles.append(
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: recorder.enter(
                    module, name, (args, kwargs)
                ),
                with_kwargs=True,
            )
        )
        handles.append(
            module.register_forward_hook(
                lambda module, args, kwargs, output: recorder.leave(module, (args, kwargs), output),
                with_kwargs=True,
            )
        )
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            recorder.add(leaf, "input", [], kind="input")
    try:
        mode = _in_mode(model, training=training)
        with mode, torch.no_grad(), without_remark(), _eager(model), recorder:
            result = model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and id(leaf) in recorder.known:
            recorder.known[id(leaf)].is_output = True
    return Trace(recorder.nodes, recorder.calls, result, recorder.unread)
