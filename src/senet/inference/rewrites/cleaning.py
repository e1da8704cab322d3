"""What says nothing in evaluation mode goes, what works in place becomes a function, and what does
not depend on the input is computed once."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.inference.rewrites.editor import Editor, without_gradient, without_writing

_NOTHING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)
# Functions of a tensor that return it where their argument `training` is False.
_DROPS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "drop_path")
_STOCHASTIC_DEPTH = "stochastic_depth"  # torchvision's
_COMPARISONS = (operator.eq, operator.ne, operator.ge, operator.gt, operator.le, operator.lt)


def clean(edit: Editor) -> None:
    """Apply all of it to a graph."""
    for node in list(edit.graph.nodes):
        _drop(edit, node)
    for node in list(edit.graph.nodes):
        _out_of_place(edit, node)
    for node in list(edit.graph.nodes):  # no sooner: 1 · x is another tensor than x
        _drop_neutral(edit, node)
    _drop_clones(edit)
    _fold_ranks(edit)
    for node in list(edit.graph.nodes):
        _drop_whole_slices(edit, node)
    fold_constants(edit)


def remove_dead(edit: Editor) -> None:
    """Remove what nothing reads."""
    edit.graph.eliminate_dead_code()


def _drop(edit: Editor, node: fx.Node) -> None:
    nothing = type(edit.called(node)) in _NOTHING
    name = edit.operation(node)
    if node.op == "call_function" and name in _DROPS:
        nothing = edit.argument(node, 2, "training", True) is False
    elif node.op == "call_function" and name == _STOCHASTIC_DEPTH:
        nothing = edit.argument(node, 3, "training", True) is False
    source = node.args[0] if node.args else None
    if nothing and isinstance(source, fx.Node):
        edit.replace(node, source)


def _drop_neutral(edit: Editor, node: fx.Node) -> None:
    """0 + x, as `sum` begins, and 1 · x."""
    neutral = {"add": 0, "mul": 1}.get(edit.operation(node))
    if neutral is None or len(node.args) != 2 or node.kwargs:
        return
    for x, number in (node.args, node.args[::-1]):
        plain = isinstance(number, int | float) and number == neutral
        same = edit.shape(x) is not None and edit.in_floats(node, x)
        if plain and isinstance(x, fx.Node) and same:
            edit.replace(node, x)
            return


def _out_of_place(edit: Editor, node: fx.Node) -> None:
    """What reads a tensor after it was changed in place reads the changed one."""
    module = edit.called(node)
    function = without_writing(node)
    by_flag = node.kwargs.get("inplace") is True or getattr(module, "inplace", False) is True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or (function is None and not by_flag):
        return
    for other in _same_memory(edit, source, node):
        if any(node < user for user in other.users):
            raise fx.proxy.TraceError(f"{node.name} writes into what is read later as {other.name}")
    for user in list(source.users):
        if user is not node and node < user:
            user.replace_input_with(source, node)
    if function is not None:
        node.target = function
    elif "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif module is not None:
        module = copy.copy(module)  # the model itself stays as it is
        module.inplace = False  # type: ignore[assignment]
        edit.insert_in_place_of(node, module, node.args)


def _same_memory(edit: Editor, source: fx.Node, at: fx.Node) -> list[fx.Node]:
    """The other nodes before `at` that may share memory with `source`."""
    found = [edit.memory_of(source)]
    for each in found:
        found += [u for u in each.users if u < at and edit.is_view(u) and u.args[0] is each]
    return [each for each in found if each is not source]


def _drop_clones(edit: Editor) -> None:
    """Copies, where nothing writes into a tensor any more, and nobody is given one."""
    if any(edit.writes(node) for node in edit.graph.nodes):
        return
    for node in list(edit.graph.nodes):
        source = node.args[0] if node.args else None
        handed_out = any(user.op == "output" for user in node.users)
        if edit.operation(node) == "clone" and isinstance(source, fx.Node) and not handed_out:
            edit.replace(node, source)


def _fold_ranks(edit: Editor) -> None:
    """Number of dimensions, which no batch or image size changes; assertions about it go."""
    for node in list(edit.graph.nodes):
        name = edit.operation(node)
        source = node.args[0] if node.args else None
        shape = edit.shape(source)
        rank = (name == "getattr" and node.args[1] == "ndim") or name in ("dim", "ndimension")
        if rank and shape is not None:
            _let_be(node, len(shape))
        elif (
            node.op == "call_function" and node.target in _COMPARISONS and not node.all_input_nodes
        ):
            assert callable(node.target)
            _let_be(node, node.target(*node.args))
        elif node.target is torch._assert and source is True:
            edit.graph.erase_node(node)


def _let_be(node: fx.Node, value: Any) -> None:
    """Put a number in the place of a node."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def _drop_whole_slices(edit: Editor, node: fx.Node) -> None:
    """Slices that take all channels of a map."""
    shape = edit.shape(node.args[0] if node.args else None)
    if edit.operation(node) != "getitem" or shape is None or edit.shape(node) != shape:
        return
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(isinstance(part, slice) for part in index) or len(index) < 2:
        return
    others = (*index[:1], *index[2:])
    channels = index[1] in (slice(0, shape[1]), slice(None, shape[1]), slice(None))
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not channels or any(part != slice(None) for part in others):
        return
    if index[1] != slice(None):  # whole for any image?
        elsewhere = edit.shapes_elsewhere(source, node)
        if elsewhere is None or elsewhere[0] != elsewhere[1]:
            return
    edit.replace(node, source)


def fold_constants(edit: Editor) -> None:
    """Compute what depends on parameters and numbers only."""
    values: dict[fx.Node, Any] = {}
    for node in list(edit.graph.nodes):
        if node.op == "get_attr":
            value = edit.constant(node)
            if value is not None:
                values[node] = value
        elif _computable(node, values):
            values[node] = _computed(node, values)
    for node, value in values.items():
        needed = any(user not in values for user in node.users)
        if node.op == "get_attr" or not needed or not isinstance(value, Tensor):
            continue
        name = "constant"
        while hasattr(edit.module, name):
            name += "_"
        edit.module.register_parameter(name, without_gradient(value))
        with edit.graph.inserting_before(node):
            new = edit.graph.get_attr(name)
        edit.replace(node, new)


def _computable(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    sources = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or not sources or node.is_impure():
        return False
    if node.op == "call_method" and str(node.target).endswith("_"):
        return False
    return all(source in values for source in sources)


@torch.no_grad()
def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
