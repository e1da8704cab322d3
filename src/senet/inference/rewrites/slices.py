"""A convolution whose channels go different ways, as a convolution for each.

A slice of a convolution's channels is a convolution with these rows of its weight: nothing is
copied, and each part can take in what follows it.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Mapping
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
        if shape is None or len(shape) != module.dims + 2:
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
        sizes = channel_sizes(user, edit.results)
        bounds = channel_bounds(user, edit.results)
        if sizes is not None:
            ends = list(itertools.accumulate(sizes))
            for part in user.users:
                place = part.args[1]
                assert isinstance(place, int)
                found[part] = (ends[place] - sizes[place], ends[place])
        elif bounds is not None:
            found[user] = bounds
        else:
            return None
    return found if len(found) > 1 else None


def channel_sizes(node: fx.Node, results: Mapping[fx.Node, Any]) -> list[int] | None:
    """Channels of the parts of a split of a map (N,C,*) by channels, of which parts are read.

    Args:
        node: any node.
        results: what each node gives.

    Returns:
        None where the node is anything else.
    """
    target = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    pieces = results.get(node)
    if node.op not in ("call_method", "call_function") or target not in _SPLITS:
        return None
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if not isinstance(dim, int) or not isinstance(pieces, list | tuple):
        return None
    for piece in pieces:
        if not isinstance(piece, Tensor) or piece.ndim not in (3, 4) or dim % piece.ndim != 1:
            return None
    read = all(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users
    )
    return [int(piece.shape[1]) for piece in pieces] if read else None


def channel_bounds(node: fx.Node, results: Mapping[fx.Node, Any]) -> tuple[int, int] | None:
    """First and last channel of a slice of a map (N,C,*) by channels; None for anything else."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    whole = results.get(node.args[0])  # type: ignore[arg-type]
    index = node.args[1]
    if not isinstance(whole, Tensor) or not 3 <= whole.ndim <= 4:
        return None
    if not 2 <= len(index) <= whole.ndim:
        return None
    images, part, *places = index
    if images != slice(None) or any(each not in (slice(None), Ellipsis) for each in places):
        return None
    if not isinstance(part, slice) or part.step not in (None, 1):
        return None
    if not all(value is None or isinstance(value, int) for value in (part.start, part.stop)):
        return None
    start, end, _ = slice(part.start, part.stop).indices(whole.shape[1])
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
