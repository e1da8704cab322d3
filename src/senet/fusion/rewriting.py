"""The forward of a module written anew, with its tails as calls of the operator.

torch.fx traces the module's own forward, its children closed but for those that hold a part of a
tail that ends outside of them. In the graph each batch norm is followed to the end of its tail.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet.fusion import execution
from senet.fusion.facts import Facts, facts_of, has_none
from senet.fusion.modules import (
    Gate,
    activation_of,
    function_activation,
    is_depthwise,
    is_norm,
    is_three_by_three,
    normalizes_and_activates,
    own_activation,
)
from senet.fusion.tracing import (
    SCALED,
    Ran,
    Unreadable,
    call_hooks_once,
    compiled,
    only_argument,
    traced,
)
from senet.ops import Activation

DEPTHWISE, THREE_BY_THREE = "depthwise", "3×3 convolution"
ALONE = "a batch norm alone, at which PyTorch is as fast"
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_LINEAR = Activation("linear")


@dataclass(frozen=True)
class Plan:
    """What to do with a module.

    Attributes:
        opened: names of its modules that are traced into.
        gates: SE blocks within it that the operator can compute, by their names; "" is the module.
        reads: whether it is a convolution that alone reads a tail, whose result it need not keep.
        norms: names of its batch norms that were seen on maps, and on nothing else.
    """

    opened: frozenset[str]
    gates: Mapping[str, Gate]
    reads: bool = False
    norms: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Part:
    """A tail that runs in the operator.

    Attributes:
        norm: name of its batch norm, or convolution, within the module; "" where it is the module;
            None for SE alone.
        block: name of its SE block, likewise; None without.
        form: its steps, as `senet.anatomy.tails` names them.
    """

    norm: str | None
    block: str | None
    form: str


@dataclass(frozen=True)
class Rewritten:
    """A forward that was written anew.

    Attributes:
        function: (module, x) → what its forward gives.
        parts: the tails in it.
        touched: paths of the modules that it passes by, with the class each had.
        argument: name of the forward's argument.
        facts: by path what the modules that were read or are passed by were like.
        modal: paths of those that have to be in the module's own mode, training or evaluation.
        scaled: paths of modules whose results an inserted SE block scales, with the block's.
    """

    function: Callable[[nn.Module, Tensor], Any]
    parts: tuple[Part, ...]
    touched: tuple[tuple[tuple[str, ...], type], ...]
    argument: str
    facts: tuple[tuple[tuple[str, ...], Facts], ...]
    modal: tuple[tuple[str, ...], ...] = ()
    scaled: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)


def _whole(module: nn.Module, plan: Plan) -> Rewritten:
    """Of a module that is a tail, an SE block or a convolution, and nothing else.

    Raises:
        Unreadable: the operator does not have its activation.
    """
    names: tuple[str, ...] = ()
    part: Part | None
    if plan.reads or is_depthwise(module) or is_three_by_three(module):
        kinds = {DEPTHWISE: is_depthwise(module), THREE_BY_THREE: is_three_by_three(module)}
        part = next((Part("", None, kind) for kind, is_it in kinds.items() if is_it), None)
        compute = execution.depthwise if kinds[DEPTHWISE] else execution.convolution
        function = execution.reading(compute) if plan.reads else compute

    elif "" in plan.gates:
        gate = plan.gates[""]
        names, part = gate.inside, Part(None, "", "se")

        def function(module: nn.Module, x: Tensor) -> Tensor:
            fc1, fc2 = module.get_submodule(gate.fc1), module.get_submodule(gate.fc2)
            return execution.excited(x, fc1, fc2, gate.hidden_activation, gate.gate)

    else:
        activation = own_activation(module)
        if activation is None:
            raise Unreadable(f"the activation {type(module.act).__name__}")
        if activation == _LINEAR:
            raise Unreadable(ALONE)
        name, slope = activation
        names = tuple(n for n, _ in module.named_modules() if n)
        part = Part("", None, f"norm → {name}")

        def function(module: nn.Module, x: Tensor) -> Tensor:
            assert isinstance(module, _BatchNorm)
            return execution.normalized(x, module, None, None, "relu", "sigmoid", name, slope)

    passed = {(): module, **_by_path(module, names)}
    touched = tuple((path, type(m)) for path, m in passed.items())
    parts = () if part is None else (part,)
    return Rewritten(function, parts, touched, only_argument(module), _facts(passed))


def _by_path(module: nn.Module, names: Iterable[str]) -> dict[tuple[str, ...], nn.Module]:
    return {tuple(name.split(".")): module.get_submodule(name) for name in names}


def _facts(modules: Mapping[tuple[str, ...], nn.Module]) -> tuple[Any, ...]:
    """What they are like; batch norms are asked at each call."""
    found = sorted(modules.items(), key=lambda item: item[0])
    return tuple((path, facts_of(m)) for path, m in found if not (is_norm(m) or has_none(m)))


def rewrite(module: nn.Module, plan: Plan, ran: Ran | None = None) -> Rewritten:
    """Its forward, written anew.

    Args:
        module: whose forward.
        plan: how.
        ran: what it did in a run; its graph has to do the same.

    Raises:
        Unreadable: the forward cannot be read, or has no tail.
    """
    convolves = is_depthwise(module) or is_three_by_three(module)
    if is_norm(module) or convolves or "" in plan.gates or plan.reads:
        return _whole(module, plan)
    graphs = traced(module, plan.opened, ran)
    first, *others = [_Replacement(module, plan, graph).run() for graph in graphs]
    parts, touched, scaled = first
    if any(other != first for other in others):
        raise Unreadable("its tails differ between training and evaluation")
    if not parts:
        raise Unreadable("no part of it has the form that the operator computes")
    functions = [compiled(graph, type(module).__name__) for graph in graphs]
    passed = _by_path(module, touched | plan.opened)
    read = {(): module, **_by_path(module, plan.opened)}
    return Rewritten(
        functions[0] if len(functions) == 1 else _by_mode(*functions),
        tuple(parts),
        tuple((path, type(m)) for path, m in sorted(passed.items(), key=lambda item: item[0])),
        only_argument(module),
        _facts({**passed, **read}),
        tuple(path for path in sorted(read) if path) if len(functions) > 1 else (),
        {tuple(name.split(".")): tuple(block.split(".")) for name, block in scaled.items()},
    )


def _by_mode(
    training: Callable[[nn.Module, Tensor], Any], evaluation: Callable[[nn.Module, Tensor], Any]
) -> Callable[[nn.Module, Tensor], Any]:
    return lambda module, x: (training if module.training else evaluation)(module, x)


class _Replacement:
    """Replaces the tails in a graph."""

    def __init__(self, module: nn.Module, plan: Plan, graph: fx.Graph) -> None:
        self.module, self.plan, self.graph = module, plan, graph
        self.parts: list[Part] = []
        self.touched: set[str] = set()
        self.scaled: dict[str, str] = {}

    def run(self) -> tuple[list[Part], set[str], dict[str, str]]:
        for node in list(self.graph.nodes):
            if self.norm(node) and not self.is_shortcut(node):
                self.replace(node)
        self.scaled |= call_hooks_once(self.graph)
        for node in list(self.graph.nodes):
            if node.op == "call_module" and node.target in self.plan.gates:
                self.replace_block(node)
        return self.parts, self.touched, self.scaled

    def submodule(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def norm(self, node: fx.Node) -> bool:
        """Whether a batch norm of a map, and nothing else, gives this."""
        called = node.op == "call_module" and node.target in self.plan.norms
        return called and len(node.args) == 1 and is_norm(self.submodule(node))

    def next(self, node: fx.Node) -> fx.Node | None:
        """What alone reads a result; None where nothing or more does."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        return user

    def activation(self, node: fx.Node) -> Activation | None:
        """The activation that a node is."""
        if node.op == "call_module":
            found = None if node.target in self.plan.gates else activation_of(self.submodule(node))
            return found if len(node.args) == 1 and not node.kwargs else None
        if node.op in ("call_function", "call_method"):
            return function_activation(node.target, node.args, node.kwargs)
        return None

    def is_shortcut(self, node: fx.Node) -> bool:
        """Whether a norm ends in the addition of another one's tail."""
        end = self.follow(node).end
        user = self.next(end)
        if user is None or not _is_addition(user):
            return False
        first, second = user.args
        other = second if first is end else first
        assert isinstance(other, fx.Node)
        rival = self.tail_before(other)
        if rival is None or not rival.known:
            return False
        mine = self.follow(node)
        if mine.activation != _LINEAR or rival.activation != _LINEAR:
            return False
        if (mine.block is None) != (rival.block is None):
            return mine.block is None
        return first is not end

    def tail_before(self, end: fx.Node) -> _Tail | None:
        """The tail whose last step, before an addition, gives this."""
        node = end
        while node.op in ("call_module", "call_function", "call_method") and node.args:
            if self.norm(node):
                found = self.follow(node)
                return found if found.end is end else None
            source = node.args[0]
            if not isinstance(source, fx.Node):
                return None
            node = source
        return None

    def follow(self, node: fx.Node) -> _Tail:
        """The tail up to an addition."""
        tail = _Tail(node, [node])
        own = own_activation(self.submodule(node))
        if own is None:
            tail.known = False
            return tail
        tail.activation = own
        while (user := self.next(tail.end)) is not None:
            gated = user.op == "call_module" and user.target in self.plan.gates
            found = self.activation(user)
            if gated and len(user.args) == 1 and tail.block is None:
                tail.block = user
            elif found is not None and (found == _LINEAR or tail.activates(found)):
                tail.activation = tail.activation if found == _LINEAR else found
            else:
                break
            tail.nodes.append(user)
        return tail

    def gate(self, tail: _Tail) -> Gate | None:
        return None if tail.block is None else self.plan.gates[str(tail.block.target)]

    def replace(self, node: fx.Node) -> None:
        tail = self.follow(node)
        if not tail.known:
            return
        gate = self.gate(tail)
        addition = self.next(tail.end)
        adds = (
            addition is not None
            and _is_addition(addition)
            and tail.activation == _LINEAR
            and (gate is None or gate.hidden_activation == "relu")
        )
        if adds and addition is not None:
            self.replace_sum(tail, gate, addition)
        else:
            self.replace_tail(tail, gate)

    def replace_tail(self, tail: _Tail, gate: Gate | None) -> None:
        while isinstance(self.submodule(tail.end), nn.Identity):
            tail.nodes.pop()  # left where it is, for whoever listens there
        if len(tail.nodes) == 1 and tail.activation == _LINEAR:
            return
        with self.graph.inserting_after(tail.end):
            made = self.graph.call_function(execution.normalized)
        hidden, sigma = ("relu", "sigmoid") if gate is None else gate[2:4]
        functions = (hidden, sigma, tail.activation.name, tail.activation.parameter)
        with self.graph.inserting_before(made):
            layers = self.layers(tail, gate)
            norm = self.fetch(str(tail.first.target))
            made.args = (tail.first.args[0], norm, *layers, *functions)
        steps = [] if tail.activation == _LINEAR else [tail.activation.name]
        self.finish(tail, tail.nodes, made, steps)

    def replace_sum(self, tail: _Tail, gate: Gate | None, addition: fx.Node) -> None:
        nodes, end = [*tail.nodes, addition], addition
        after = self.next(addition)
        behind = None if after is None else self.activation(after)
        if after is None or behind is None or behind == _LINEAR:
            behind = _LINEAR
        else:
            nodes.append(after)
            end = after
        first, second = addition.args
        shortcut = second if first is tail.end else first
        assert isinstance(shortcut, fx.Node)
        other = self.norm_alone(shortcut)
        with self.graph.inserting_after(end):
            made = self.graph.call_function(execution.added)
        with self.graph.inserting_before(made):
            norm = self.fetch(str(tail.first.target))
            shortcut_norm = None if other is None else self.fetch(str(other.target))
            layers = self.layers(tail, gate)
            added = shortcut if other is None else other.args[0]
            sigma = "sigmoid" if gate is None else gate.gate
            source = tail.first.args[0]
            made.args = (source, added, norm, shortcut_norm, *layers, sigma, *behind)
        if other is not None:
            nodes.insert(0, other)
        self.finish(tail, nodes, made, ["add", *([] if behind == _LINEAR else [behind.name])])

    def norm_alone(self, shortcut: fx.Node) -> fx.Node | None:
        """The batch norm whose result a shortcut is; None where it is more or something else."""
        if len(shortcut.users) != 1 or not self.norm(shortcut):
            return None
        return shortcut if own_activation(self.submodule(shortcut)) == _LINEAR else None

    def replace_block(self, node: fx.Node) -> None:
        if len(node.args) != 1 or node.kwargs:
            return
        name = str(node.target)
        gate = self.plan.gates[name]
        with self.graph.inserting_before(node):
            fc1, fc2 = (self.fetch(_joined(name, layer)) for layer in gate[:2])
            arguments = (node.args[0], fc1, fc2, gate.hidden_activation, gate.gate)
            made = self.graph.call_function(execution.excited, arguments)
        self.touch(name, gate)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        self.parts.append(Part(None, name, "se"))

    def fetch(self, name: str) -> fx.Node:
        """A module as an argument."""
        return self.graph.get_attr(name)

    def layers(self, tail: _Tail, gate: Gate | None) -> tuple[fx.Node | None, fx.Node | None]:
        if gate is None or tail.block is None:
            return None, None
        name = str(tail.block.target)
        return self.fetch(_joined(name, gate.fc1)), self.fetch(_joined(name, gate.fc2))

    def finish(
        self, tail: _Tail, nodes: list[fx.Node], made: fx.Node, following: list[str]
    ) -> None:
        """Put `made` in the place of the nodes, of which the last gave the tail's result."""
        gate = self.gate(tail)
        nodes[-1].replace_all_uses_with(made)
        for node in reversed(nodes):
            if node.op == "call_module":
                self.touch(str(node.target), self.plan.gates.get(str(node.target)))
            if SCALED in node.meta:
                self.scaled[node.meta[SCALED]] = str(node.target)
            self.graph.erase_node(node)
        block = None if tail.block is None else str(tail.block.target)
        squeezed = [] if gate is None else ["se"]
        steps = [*squeezed, *following] if "add" in following else [*following, *squeezed]
        self.parts.append(Part(str(tail.first.target), block, " → ".join(["norm", *steps])))

    def touch(self, name: str, gate: Gate | None) -> None:
        self.touched.add(name)
        module = self.module.get_submodule(name)
        if gate is not None:
            self.touched |= {_joined(name, inner) for inner in gate.inside}
        elif normalizes_and_activates(module):
            self.touched |= {_joined(name, inner) for inner in ("drop", "act")}


class _Tail:
    """The steps of a tail up to an addition.

    Attributes:
        first: the batch norm.
        nodes: all steps in their order.
        activation: behind the norm.
        block: the SE block, behind that; None without.
        known: whether the operator has the activation.
    """

    def __init__(self, first: fx.Node, nodes: list[fx.Node]) -> None:
        self.first, self.nodes = first, nodes
        self.activation = _LINEAR
        self.block: fx.Node | None = None
        self.known = True

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    def activates(self, found: Activation) -> bool:
        """Whether another activation can still come."""
        return self.activation == _LINEAR and self.block is None


def _is_addition(node: fx.Node) -> bool:
    """Whether two results, and no more, are added."""
    called = node.op in ("call_function", "call_method") and node.target in _ADDITIONS
    two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    return called and two and not node.kwargs and node.args[0] is not node.args[1]


def _joined(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer else inner
