"""Calls whose first arguments were given by name, as calls with them in their places."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op

_IN_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def in_places(graph: fx.Graph, root: nn.Module) -> None:
    """Put what a call reads into its place, up to the first argument that reads nothing.

    Rewrites then find in `args` what a node reads first. Options stay by name; methods have the
    tensor that they are called on in its place already.

    Args:
        graph: a traced graph.
        root: the module whose parts it calls.
    """
    for node in graph.nodes:
        if not node.kwargs or node.op not in ("call_module", "call_function"):
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        for name in _names(node, root)[len(args) :]:
            if name not in kwargs or not _reads(kwargs[name]):
                break
            args.append(kwargs.pop(name))
        node.args, node.kwargs = tuple(args), kwargs


def _reads(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def _names(node: fx.Node, root: nn.Module) -> Sequence[str]:
    """The names of the arguments that a call takes by position, as far as they are known."""
    called: Any = node.target
    if node.op == "call_module":
        called = root.get_submodule(str(node.target)).forward
    try:
        signatures = [inspect.signature(called)]
    except (TypeError, ValueError):  # a function in C++, which may have several
        signatures = [
            each
            for each in get_signature_for_torch_op(called) or ()
            if each.parameters.keys() >= node.kwargs.keys()
        ]
    names = [
        [name for name, parameter in each.parameters.items() if parameter.kind in _IN_PLACE]
        for each in signatures
    ]
    if names == [[]] and called.__module__ == nn.functional.__name__:
        return ["input"]  # it chooses one of two functions, which take that first
    agreed = takewhile(lambda same: len(set(same)) == 1, zip(*names, strict=False))
    return [same[0] for same in agreed]
