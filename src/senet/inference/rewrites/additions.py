"""Additions into the convolution, or the pass, that gives one of the summands."""

from __future__ import annotations

from torch import fx

from senet.inference.modules import FusedConv, Pointwise
from senet.inference.rewrites.editor import Editor


def take_in(edit: Editor) -> None:
    """δ(branch + shortcut) goes into the branch's last convolution."""
    for node in list(edit.graph.nodes):
        if node in edit.graph.nodes and edit.operation(node) == "add":
            _take_in(edit, node)


def _take_in(edit: Editor, node: fx.Node) -> None:
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return
    a, b = node.args
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    alpha = node.kwargs.get("alpha", 1)
    if set(node.kwargs) - {"alpha"} or not isinstance(alpha, int | float):
        return
    if edit.shape(a) != edit.shape(b):
        return  # one of them is made larger
    options = [(b, a)] if alpha != 1 else [(a, b), (b, a)]
    # Prefer the branch that has gates: its pass over memory must happen anyway. And the later one:
    # the earlier may be read by others in between.
    options.sort(key=lambda pair: -len(pair[0].args))
    for branch, shortcut in options:
        module = edit.takes_more(branch)
        if not isinstance(module, FusedConv | Pointwise) or branch is shortcut:
            continue
        if len(branch.args) > 2 or not edit.single_use(branch) or not edit.may_move(branch, node):
            continue
        if alpha != 1:
            module.multiply(alpha)
        gates = branch.args[1] if len(branch.args) > 1 else None
        new = edit.move(branch, node, (branch.args[0], gates, shortcut))
        edit.say(new, "addition in the same pass")
        return
