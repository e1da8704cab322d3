"""The forward of a module as a graph of operations: what torch.fx reads, and whether that is all.

fx runs the code with stand-ins for tensors. What is no operation of theirs happens then and is not
in the graph: modes of autograd, random numbers of Python, attributes that are set, branches on what
the stand-ins are. A forward that does such things is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from senet.anatomy.graph import Call, Trace
from senet.anatomy.recording import record
from senet.fusion.modules import is_norm
from senet.fusion.state import ModuleState, RandomState, watched
from senet.fusion.steps import is_sharded, like, steps
from senet.nn.hooks import scaling_block

# Of a node that calls an inserted SE block: the module whose hook does it.
SCALED = "scaled"
# What reading a forward with stand-ins for tensors may raise.
_UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError, KeyError),
    *(NotImplementedError, NameError),
)


class Unreadable(Exception):  # noqa: N818  # a reason, which the report gives
    """Why a module's forward cannot be written anew."""


class Ran(NamedTuple):
    """What a module did in a recorded run.

    Attributes:
        trace: the run.
        call: the module's.
    """

    trace: Trace
    call: Call

    @property
    def steps(self) -> list[tuple[Any, ...]]:
        """The operations in the call."""
        return steps(node for node in self.trace.nodes if node.within(self.call))


class _Tracer(fx.Tracer):
    """Opens the modules it is told to, and calls no hooks but those of inserted SE blocks."""

    def __init__(self, opened: frozenset[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        leaf = self.is_leaf_module(m, name)
        if leaf:
            result = super().call_module(m, forward, args, kwargs)
        else:
            result = type(m).forward(m, *args, **kwargs)
        block = scaling_block(m) if is_norm(m) or not leaf else None
        if block is None:
            return result
        scaled = self.create_proxy("call_module", self.path_of_module(block), (result,), {})
        scaled.node.meta[SCALED] = name
        return scaled


def only_argument(module: nn.Module) -> str:
    """Name of the one argument that a forward takes.

    Raises:
        Unreadable: it takes others too.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is not parameters[0].POSITIONAL_OR_KEYWORD:
        raise Unreadable("its forward takes more than one argument")
    return parameters[0].name


def traced(module: nn.Module, opened: frozenset[str], ran: Ran | None) -> list[fx.Graph]:
    """The graph of its forward: where they differ, that in training and that in evaluation.

    Raises:
        Unreadable: there is none, or it is not all that the forward does.
    """
    if "forward" in vars(module):
        raise Unreadable("its forward was replaced")
    only_argument(module)
    modes = [(m, m.training) for m in module.modules()]
    state, numbers = ModuleState(module), RandomState()
    graphs, error = [], None
    try:
        with torch.enable_grad(), watched() as noted:
            for training in (True, False):
                for m, _ in modes:
                    m.training = training
                graphs.append(_Tracer(opened).trace(module))
    except _UNREADABLE as raised:
        error = raised
    finally:
        for m, training in modes:
            m.training = training
        changed, moved = state.changed(), numbers.moved()
        state.restore()
        numbers.restore()
    if noted:
        raise Unreadable(f"its forward uses or asks for {noted[0]}") from error
    if moved:
        raise Unreadable("its forward draws random numbers of its own") from error
    if error is not None:
        what = f"its forward cannot be read ({str(error).split(chr(10), 1)[0]})"
        raise Unreadable(what) from error
    if changed is not None:
        own = "_tensor_constant" in changed
        what = "makes tensors of its own" if own else f"sets {changed}"
        raise Unreadable(f"its forward {what}")
    if (
        ran is not None
        and not is_sharded(module)
        and _replayed(module, graphs[-1], ran) != ran.steps
    ):
        raise Unreadable("its forward does something else with tensors than with stand-ins")
    return graphs[:1] if str(graphs[0]) == str(graphs[1]) else graphs


def _replayed(module: nn.Module, graph: fx.Graph, ran: Ran) -> list[tuple[Any, ...]]:
    """The operations of a graph in evaluation, with an input like the one that the module had.

    Raises:
        Unreadable: the graph cannot be run, or the module did not take one tensor.
    """
    if len(ran.call.inputs) != 1:
        raise Unreadable("its forward takes no tensor, or several")
    once = fx.Graph()
    once.output(once.graph_copy(graph, {}))
    call_hooks_once(once)
    module.__dict__["forward"] = partial(compiled(once, type(module).__name__), module)
    try:
        trace = record(module, (like(ran.call.inputs[0], module),))
    except _UNREADABLE as error:
        what = f"its graph cannot be run ({str(error).split(chr(10), 1)[0]})"
        raise Unreadable(what) from error
    finally:
        del module.__dict__["forward"]
    return steps(trace.nodes)


def compiled(graph: fx.Graph, name: str) -> Callable[[nn.Module, Tensor], Any]:
    """A graph as a function of the module and its input."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<senet.fuse of {name}>", "exec"), namespace)
    return namespace["forward"]


def call_hooks_once(graph: fx.Graph) -> dict[str, str]:
    """Take the calls of inserted SE blocks out where their modules are called, whose hooks do that.

    Returns:
        The modules that are not called, with the blocks that scale their results.
    """
    scaled: dict[str, str] = {}
    for node in list(graph.nodes):
        if SCALED not in node.meta:
            continue
        (source,) = node.args
        assert isinstance(source, fx.Node)
        if source.op == "call_module" and source.target == node.meta[SCALED]:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        else:
            scaled[node.meta[SCALED]] = str(node.target)
    return scaled
