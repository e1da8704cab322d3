"""A convolution whose channels go different ways, as a convolution for each.

A slice of a convolution's channels is a convolution with these rows of its weight: nothing is
copied, and each part can take in what follows it.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx

from senet.inference.modules import FusedConv
from senet.inference.rewrites.editor import Editor, without_gradient

_SPLITS = ("split", "chunk", "tensor_split", "split_with_sizes")


def of_convolutions(edit: Editor) -> None:
    """Cut each convolution that nothing reads but slices of its channels."""
    for node in list(edit.graph.nodes):
        _drop_contiguous(edit, node)
    for node in list(edit.graph.nodes):
        module = edit.called(node)
        shape = edit.shape(node)
        if not isinstance(module, FusedConv) or module.groups != 1 or len(node.args) != 1:
            continue
        if shape is None or len(shape) != 4:
            continue
        parts = _parts(edit, node, shape)
        if parts is None or sum(end - start for start, end in parts.values()) > shape[1]:
            continue
        for part, (start, end) in parts.items():
            new = edit.insert(_rows(module, start, end), node, node.args, edit.name_of(node))
            edit.say(new, f"channels {start} to {end} alone")
            edit.replace(part, new)


def _drop_contiguous(edit: Editor, node: fx.Node) -> None:
    """Drop a copy that only orders memory, where no view needs that."""
    source = node.args[0] if node.args else None
    if edit.operation(node) != "contiguous" or not isinstance(source, fx.Node):
        return
    if all(edit.operation(user) != "view" for user in node.users) and not _is_returned(node):
        edit.replace(node, source)


def _is_returned(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _parts(
    edit: Editor, node: fx.Node, shape: tuple[int, ...]
) -> dict[fx.Node, tuple[int, int]] | None:
    """The slices that read a node, with first and last channel; None where something else does."""
    found: dict[fx.Node, tuple[int, int]] = {}
    for user in node.users:
        if edit.reads_shape(user):
            continue
        if edit.operation(user) == "getitem":
            bounds = _bounds(user, shape[1])
            if bounds is None:
                return None
            found[user] = bounds
        elif edit.operation(user) in _SPLITS and _dim(edit, user) in (1, -3):
            ends = _ends(edit.results.get(user))
            for part in user.users:
                if edit.operation(part) != "getitem" or not isinstance(part.args[1], int):
                    return None
                size = ends[part.args[1]] - ([0, *ends][part.args[1] % len(ends)])
                end = ends[part.args[1]]
                found[part] = (end - size, end)
        else:
            return None
    return found if len(found) > 1 else None


def _dim(edit: Editor, split: fx.Node) -> Any:
    return edit.argument(split, 2, "dim", 0)


def _ends(pieces: Any) -> list[int]:
    """Where each of the tensors that a split gives ends, along the channels."""
    ends, end = [], 0
    for piece in pieces:
        assert isinstance(piece, Tensor)
        end += int(piece.shape[1])
        ends.append(end)
    return ends


def _bounds(node: fx.Node, channels: int) -> tuple[int, int] | None:
    """First and last channel of a slice of channels alone."""
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) < 2:
        return None
    images, part, *places = index
    whole = all(each == slice(None) or each is Ellipsis for each in (images, *places))
    if not whole or images is Ellipsis or not isinstance(part, slice):
        return None
    if not all(value is None or isinstance(value, int) for value in (part.start, part.stop)):
        return None
    if part.step not in (None, 1):
        return None
    start, end, _ = slice(part.start, part.stop).indices(channels)
    return (start, end) if start < end else None


def _rows(module: FusedConv, start: int, end: int) -> FusedConv:
    """A convolution that gives these channels of another one."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made.weight = without_gradient(module.weight[start:end])
    made.bias = without_gradient(module.bias[start:end])
    if module.slopes is not None and len(module.slopes) > 1:
        made.slopes = without_gradient(module.slopes[start:end])
    return made
