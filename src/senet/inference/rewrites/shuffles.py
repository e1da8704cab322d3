"""Channel shuffles (arXiv 1707.01083) by what they compute: views and transpositions of a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.inference.modules import Shuffle
from senet.inference.rewrites.editor import Editor
from senet.inference.rewrites.tracing import FAILURES

_MOVES = (
    *("view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "permute", "contiguous"),
    "channel_shuffle",
)
_OF_SIZES = ("getattr", "size", "getitem", "floordiv", "mul")
_LONGEST = 16  # nodes of one shuffle
_SIZES = ((2, 3, 4), (1, 5, 2))  # images, height and width on which one is tried


def recognise(edit: Editor) -> None:
    """Make a `Shuffle` of each."""
    for node in list(edit.graph.nodes):
        shape = edit.shape(node)
        if node not in edit.graph.nodes or shape is None or len(shape) != 4 or edit.dims != 2:
            continue
        module = edit.called(node)
        if type(module) is nn.ChannelShuffle:
            edit.insert_in_place_of(node, Shuffle(module.groups), node.args[:1])
        elif edit.operation(node) in _MOVES:
            _of_moves(edit, node, shape[1])


def _of_moves(edit: Editor, node: fx.Node, channels: int) -> None:
    found = _moves(edit, node)
    if found is None or edit.shape(found[0]) != edit.shape(node):
        return
    source, steps = found
    order = {_order(source, steps, node, channels, sizes) for sizes in _SIZES}
    for groups in range(2, channels):
        if channels % groups == 0 and order == {_shuffled(channels, groups)}:
            new = edit.insert_in_place_of(node, Shuffle(groups), (source,))
            edit.say(new, f"{groups} groups of channels shuffled in one pass")
            return


def _shuffled(channels: int, groups: int) -> tuple[int, ...]:
    """Which channel comes where."""
    return tuple(torch.arange(channels).view(groups, -1).T.flatten().tolist())


def _moves(edit: Editor, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The map that a node moves the numbers of, and the nodes that do so; None for anything else.

    Beside that map they read nothing but its sizes.
    """
    source: Any = node
    while edit.operation(source) in _MOVES and isinstance((*source.args, None)[0], fx.Node):
        source = source.args[0]
    needed, waiting = {source}, [node]
    while waiting:
        each = waiting.pop()
        if each in needed:
            continue
        if edit.operation(each) not in (*_MOVES, *_OF_SIZES) or len(needed) > _LONGEST:
            return None
        needed.add(each)
        waiting += each.all_input_nodes
    return source, sorted(needed - {source})


def _order(
    source: fx.Node, steps: Sequence[fx.Node], last: fx.Node, channels: int, sizes: Sequence[int]
) -> tuple[int, ...] | None:
    """Which channel of the source the last node has where; None where it moves anything else."""
    images, height, width = sizes
    x = torch.arange(images * channels * height * width).view(images, channels, height, width)
    values: dict[fx.Node, Any] = {source: x}
    for step in steps:
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), values.__getitem__)
        try:
            if step.op == "call_method":
                values[step] = getattr(args[0], str(step.target))(*args[1:], **kwargs)
            else:
                assert callable(step.target)
                values[step] = step.target(*args, **kwargs)
        except FAILURES:  # it takes maps of other sizes only
            return None
    found = values[last]
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    order = found[0, :, 0, 0] // (height * width)
    return tuple(order.tolist()) if torch.equal(found, x[:, order]) else None
