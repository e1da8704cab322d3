"""What each node of a graph gives, without computing anything and without touching its weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from senet.inference.modules import Across, FusedConv, Pointwise, Shuffle, SqueezeGate

_FEW = 16  # whole numbers that may say how large something is


class Unknown:
    """What a node gives whose shape depends on the numbers of the input."""


UNKNOWN = Unknown()
_OF_MASKS = (torch.bool, torch.uint8)


def outline(module: nn.Module) -> nn.Module:
    """A copy of what a graph calls, whose parameters and buffers have shapes but no data.

    A few whole numbers keep their values: a network that comes from ONNX works out sizes by them.

    The graph module itself is only read, so that other threads can go on running it.
    """
    held = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(tensor): _without_data(tensor) for tensor in held}
    empty = nn.Module()
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(empty, kind, copy.deepcopy(getattr(module, kind), memo))
    return empty


def _without_data(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):
        return copy.deepcopy(tensor)  # a class that need not know tensors without data
    if tensor.dtype == torch.int64 and tensor.ndim <= 1 and tensor.numel() <= _FEW:
        return tensor.detach().cpu().clone()
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


class Growing:
    """What the nodes give of a graph that is still being traced.

    Args:
        root: the model.
        graph: its graph so far.
        x: an input.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, x: Tensor) -> None:
        self._keeping = _Keeping(outline(root), root, graph)
        self._x = x.to("meta")

    @torch.no_grad()
    def of(self, node: fx.Node) -> Any:
        """What a node gives, as tensors without data and numbers."""
        env = self._keeping.env
        for each in self._keeping.graph.nodes:
            if each not in env:
                given = each.op == "placeholder"
                env[each] = self._x if given else self._keeping.run_node(each)
            if each is node:
                break
        return env[node]


class _Keeping(fx.Interpreter):
    """Runs a graph on tensors without data and keeps what each node gives."""

    def __init__(self, empty: nn.Module, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(empty, graph=graph)
        self.real = module
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if any(self.env[source] is UNKNOWN for source in n.all_input_nodes):
            self.results[n] = UNKNOWN
            return UNKNOWN
        try:
            result = super().run_node(n)
        except (NotImplementedError, RuntimeError):
            # Quantized layers and the like have no form without data.
            result = self._run_on_zeros(n)
        self.results[n] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives; a tensor that is made of sizes with the sizes in it."""
        if target is torch.tensor:
            kwargs = {**kwargs, "device": "cpu"}
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module gives; of those that a rewrite has made it is known beforehand."""
        module = self.fetch_attr(target)
        shape = None if kwargs else known_shape(module, *args)
        if shape is not None:
            return args[0].new_empty(shape)
        return super().call_module(target, args, kwargs)

    def _run_on_zeros(self, n: fx.Node) -> Any:
        args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(n), _zeros)
        watch = _Watch()
        with watch:
            if n.op == "call_module":
                result = self.real.get_submodule(str(n.target))(*args, **kwargs)
            else:
                result = getattr(self, n.op)(n.target, args, kwargs)
        parts = torch.utils._pytree.tree_leaves(result)
        if watch.seen or any(isinstance(part, int | float) for part in parts):
            return UNKNOWN
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), result)


class _Watch(TorchDispatchMode):
    """Sees operations whose result's shape depends on the numbers that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        by_numbers = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # places may be numbers of rows, or a mask
            by_numbers = any(i is not None and i.dtype in _OF_MASKS for i in args[1])
        self.seen = self.seen or by_numbers
        return func(*args, **(kwargs or {}))


def known_shape(module: nn.Module, x: Any = None, *rest: Any) -> tuple[int, ...] | None:
    """The shape that a module of a rewritten graph gives; None where running it must tell.

    Args:
        module: the module.
        x: its first argument.
        *rest: the others: gates, which change no shape, and a shortcut.
    """
    shape: tuple[int, ...] | None = None
    match module:
        case FusedConv() if x.ndim == module.dims + 2:
            if x.shape[1] != module.weight.shape[1] * module.groups:
                return None
            sizes = module.output_size(*(1, *x.shape[2:])[-2:])
            shape = (x.shape[0], len(module.weight), *sizes[-module.dims :])
        case Across() | Shuffle():
            shape = tuple(x.shape)
        case Pointwise():
            channels = None if module.scale is None else len(module.scale)
            if channels is None or (x.ndim in (2, 3, 4) and x.shape[1] == channels):
                shape = tuple(x.shape)
        case SqueezeGate():
            taps = 1 if module.geometry is None else math.prod(module.geometry[0])
            if x.ndim in (3, 4) and module.weight1.shape[1] == taps * x.shape[1]:
                shape = (x.shape[0], len(module.weight2))
    shortcut = rest[1] if len(rest) > 1 else None
    if shape is None or min(shape) < 1 or (shortcut is not None and shortcut.shape != shape):
        return None
    return shape


def _zeros(value: Any) -> Any:
    return torch.zeros_like(value, device="cpu") if isinstance(value, Tensor) else value


def traced_results(module: fx.GraphModule, empty: nn.Module, x: Tensor) -> dict[fx.Node, Any]:
    """What each node gives for an input like x, as tensors without data.

    `UNKNOWN` stands for that of nodes whose shape depends on the numbers of x, as that of a mask's
    rows does, and of all that read them.

    Args:
        module: the graph.
        empty: its `outline`.
        x: an input.
    """
    keeping = _Keeping(empty, module, module.graph)
    with torch.no_grad():
        keeping.run(x.to("meta"))
    return keeping.results
