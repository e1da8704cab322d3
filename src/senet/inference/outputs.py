"""What a network returns: tensors in containers of its own kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from senet.support.containers import named_parts


def rebuilt(value: Any, result: Callable[[fx.Node], Any]) -> Any:
    """What a graph returns: containers of nodes with what the nodes gave in their place.

    The graph keeps lists and dicts in immutable forms of its own; here they become plain again.
    """
    if isinstance(value, fx.Node):
        return result(value)
    if isinstance(value, Mapping):
        return {key: rebuilt(inner, result) for key, inner in value.items()}
    if isinstance(value, list):
        return [rebuilt(inner, result) for inner in value]
    if isinstance(value, tuple):
        inner = [rebuilt(each, result) for each in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    if isinstance(value, slice):
        return slice(*(rebuilt(v, result) for v in (value.start, value.stop, value.step)))
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a network returns, in the order of its containers.

    Containers are mappings, sequences and dataclasses.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)
    elif (parts := named_parts(value)) is not None:
        for inner in parts.values():
            yield from tensors(inner)
