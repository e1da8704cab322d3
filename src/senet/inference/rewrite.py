"""Rewriting a model's graph for inference: what follows a convolution goes into it.

The graph is torch.fx's: symbolic, so that batch and image size stay free. Each rewrite replaces
nodes by calls of the modules in `senet.inference.modules` and says so in the report.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from senet.inference.modules import FusedConv, Pointwise, SqueezeGate, ends_openly
from senet.models.residual import PaddedShortcut
from senet.nn.block import GlobalSqueeze, SqueezeExcitation
from senet.ops.activations import RELU

RELUS = (F.relu, torch.relu, F.relu_, torch.relu_)
ADDS = (operator.add, operator.iadd, torch.add)
DROPOUTS = (F.dropout, F.dropout2d)
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


class Tracer(fx.Tracer):
    """Follows a model down to PyTorch's own modules and SE blocks.

    What a model returns keeps its kind: fx itself takes an OrderedDict, or a dataclass that is one,
    for a plain dict, and returns its own immutable lists inside of named tuples.
    """

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

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph calls m and does not look into it."""
        own = isinstance(m, SqueezeExcitation | PaddedShortcut)
        return own or super().is_leaf_module(m, module_qualified_name)


class Rewriter:
    """A traced copy of a model, and the rewrites in the order in which they apply.

    Args:
        model: model in evaluation mode; its parameters are read, not changed.

    Attributes:
        fused: for each rewrite the module that it starts from, and what was done.
        left: SE blocks that stay as they are, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        tracer = Tracer()
        self.graph = tracer.trace(model)
        for node in self.graph.nodes:
            node.type = None  # annotations of shapes cannot be pickled
        self.module = fx.GraphModule(model, self.graph)
        self.fused: list[tuple[str, str]] = []
        self.left: list[tuple[str, str]] = []
        self.origin: dict[fx.Node, str] = {}

    def run(self) -> fx.GraphModule:
        """Apply all rewrites and return the graph as a module."""
        for rewrite in (
            self._drop_dropout,
            self._fold_batch_norms,
            self._take_in_relus,
            self._squeeze_first,
            self._take_in_additions,
            self._take_in_relus,  # of what the two before have made
        ):
            for node in list(self.graph.nodes):
                if node in self.graph.nodes:
                    rewrite(node)
        self.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()
        return self.module

    def called(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(str(node.target))
        return None

    def single_use(self, node: fx.Node) -> bool:
        """Whether one node alone reads this one."""
        return len(node.users) == 1

    def insert(self, module: nn.Module, at: fx.Node, args: tuple[Any, ...], origin: str) -> fx.Node:
        """A call of a new module in front of node `at`."""
        name = "_".join(["fused", *origin.split(".")])
        while hasattr(self.module, name):
            name += "_"
        self.module.add_submodule(name, module)
        with self.graph.inserting_before(at):
            node = self.graph.call_module(name, args)
        self.origin[node] = origin
        return node

    def move(self, node: fx.Node, at: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """The call of `node` with other arguments in place of node `at`; both nodes go."""
        with self.graph.inserting_before(at):
            new = self.graph.call_module(str(node.target), args)
        self.origin[new] = self.origin[node]
        self.replace(at, new)
        self.graph.erase_node(node)
        return new

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` stand for `old`, which goes."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def say(self, node: fx.Node, what: str) -> None:
        """Note a rewrite for the report."""
        self.fused.append((self.origin.get(node, str(node.target)), what))

    def is_relu(self, node: fx.Node) -> bool:
        """Whether a node is a ReLU of its first argument."""
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.target in RELUS or isinstance(self.called(node), nn.ReLU)

    def _drop_dropout(self, node: fx.Node) -> None:
        nothing = isinstance(self.called(node), DROPOUT_MODULES)
        if nothing or (node.op == "call_function" and node.target in DROPOUTS):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            self.replace(node, source)

    def _fold_batch_norms(self, node: fx.Node) -> None:
        module = self.called(node)
        if isinstance(module, nn.Conv2d) and plain(module) and plain_conv(module):
            follower = next(iter(node.users), None)
            bn = foldable(self.called(follower)) if self.single_use(node) else None
            new = self.insert(FusedConv(module, bn), node, node.args, str(node.target))
            self.replace(node, new)
            if bn is not None and follower is not None:
                self.say(new, f"batch norm {follower.target} folded into the convolution")
                self.replace(follower, new)
        elif (bn := foldable(module)) is not None:
            new = self.insert(Pointwise(bn), node, node.args, str(node.target))
            self.say(new, "batch norm as one scale and offset")
            self.replace(node, new)

    def _take_in_relus(self, node: fx.Node) -> None:
        if not self.is_relu(node):
            return
        source = node.args[0]
        module = self.called(source)
        if (
            isinstance(source, fx.Node)
            and isinstance(module, FusedConv | Pointwise)
            and ends_openly(module)
            and self.single_use(source)
        ):
            module.activation = RELU
            self.say(source, "ReLU in the same pass")
            self.replace(node, source)

    def _squeeze_first(self, node: fx.Node) -> None:
        se = self.called(node)
        if not isinstance(se, SqueezeExcitation) or len(node.args) != 1 or node.kwargs:
            return
        why_not = obstacle(se)
        if why_not is not None:
            self.left.append((str(node.target), why_not))
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        conv = self.called(source)
        name = str(node.target)
        if isinstance(conv, FusedConv) and commutes(conv) and self.single_use(source):
            gates = self.insert(SqueezeGate(se, conv), node, source.args[:1], name)
            new = self.move(source, node, (source.args[0], gates))
            self.say(new, f"squeeze of {name} before the convolution, scale in the same pass")
        else:
            gates = self.insert(SqueezeGate(se), node, (source,), name)
            new = self.insert(Pointwise(), node, (source, gates), name)
            self.say(new, "scale in one pass")
            self.replace(node, new)

    def _take_in_additions(self, node: fx.Node) -> None:
        """relu(branch + shortcut) goes into the branch's last convolution."""
        is_add = node.op == "call_function" and node.target in ADDS
        if not is_add or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            return
        a, b = node.args
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        alpha = node.kwargs.get("alpha", 1)
        if set(node.kwargs) - {"alpha"} or not isinstance(alpha, int | float):
            return
        options = [(b, a)] if alpha != 1 else [(a, b), (b, a)]
        # Prefer the branch that has gates: its pass over memory must happen anyway.
        options.sort(key=lambda pair: -len(pair[0].args))
        for branch, shortcut in options:
            module = self.called(branch)
            if not isinstance(module, FusedConv | Pointwise) or branch is shortcut:
                continue
            if not ends_openly(module):
                continue
            if len(branch.args) > 2 or not self.single_use(branch):
                continue
            if alpha != 1:
                module.multiply(alpha)
            gates = branch.args[1] if len(branch.args) > 1 else None
            new = self.move(branch, node, (branch.args[0], gates, shortcut))
            self.say(new, "addition in the same pass")
            return


def obstacle(se: SqueezeExcitation) -> str | None:
    """Why the gates of an SE block cannot be computed from its weights, or None if they can."""
    if se.dims != 2:
        return f"it takes {se.dims} spatial dimensions"
    squeeze: nn.Module = se.squeeze
    if not isinstance(squeeze, GlobalSqueeze):
        return f"its squeeze is a {type(squeeze).__name__}"
    if squeeze.method != "avg":
        return f"squeeze={squeeze.method!r}"
    for name in ("fc1", "fc2"):
        layer = getattr(se, name)
        if not plain(layer):
            return f"its {name} is a {type(layer).__name__}"
    return None


def plain(module: nn.Module) -> bool:
    """Whether a layer computes what its name says: PyTorch's own class, not one derived from it.

    Parametrized layers are of a class of their own, but differ in where the weights come from only.
    """
    kind: type = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    return kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def plain_conv(conv: nn.Conv2d) -> bool:
    """Whether a convolution pads with zeros, and by numbers."""
    return not isinstance(conv.padding, str) and conv.padding_mode == "zeros"


def foldable(module: nn.Module | None) -> nn.BatchNorm2d | None:
    """The module if it is a batch norm with running statistics."""
    if isinstance(module, nn.BatchNorm2d) and plain(module) and module.running_mean is not None:
        return module
    return None


def commutes(conv: FusedConv) -> bool:
    """Whether a mean may be taken before this convolution instead of behind it.

    With stride the input would be larger than the output: nothing to gain.
    """
    return ends_openly(conv) and conv.groups == 1 and conv.stride == (1, 1)
