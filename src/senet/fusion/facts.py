"""Attributes that a module's code may depend on: kept when it is read, compared when called."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN = (*_NUMBERS, FunctionType, BuiltinFunctionType, type)
_SEQUENCES = (tuple, list, set, frozenset, torch.Size)
_MAPPINGS = (dict, OrderedDict)
# Every module has the first ones; the others change no values, or are ours.
_PASSED_BY = frozenset(
    (*vars(nn.Module()), "training", "inplace", "forward", "_compiled_call_impl")
)


class Facts(NamedTuple):
    """What a module was like.

    Attributes:
        values: its attributes that are plain: numbers, text, functions, and what consists of these.
        size: how many attributes it had, but for a forward of ours.
        children: names of the modules in it.
        parameters: names of the parameters in it.
    """

    values: dict[str, Any]
    size: int
    children: list[str]
    parameters: list[str]


def facts_of(module: nn.Module) -> Facts:
    """What it is like now."""
    values = {name: _copied(value) for name, value in _plain_ones(module).items()}
    return Facts(values, _size(module), _present(module._modules), _present(module._parameters))


def is_other(module: nn.Module, facts: Facts) -> bool:
    """Whether anything of it has changed.

    First in ways that take no time; what these cannot tell, such as a copy of a list of modules, is
    looked at closely.
    """
    held = vars(module)
    for now, before in (
        (held["_modules"], facts.children),
        (held["_parameters"], facts.parameters),
    ):
        if (now or before) and _present(now) != before:
            return True
    if _size(module) == facts.size and facts.values.items() <= held.items():
        return False
    now = _plain_ones(module)
    new = [name for name in now if name not in facts.values and not name.startswith("_")]
    if new or any(name not in now for name in facts.values):  # wrappers add private ones
        return True
    return any(_form(now[name]) != _form(value) for name, value in facts.values.items())


def has_none(module: nn.Module) -> bool:
    """Whether this is a module of PyTorch's without anything that could change: a ReLU."""
    plain = type(module).__module__.startswith("torch.nn.modules")
    return plain and not (module._modules or module._parameters or _plain_ones(module))


def _present(held: dict[str, Any]) -> list[str]:
    return [name for name, value in held.items() if value is not None]


def _size(module: nn.Module) -> int:
    held = vars(module)
    return len(held) - ("forward" in held)


def _plain_ones(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _PASSED_BY and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _SEQUENCES:
        return all(map(_is_plain, value))
    if kind in _MAPPINGS:
        return all(map(_is_plain, value.values()))
    return kind in _PLAIN or isinstance(value, (type, partial, MethodType, nn.Module))


def _copied(value: Any) -> Any:
    """A value that stays what it is while the original changes."""
    kind = type(value)
    if kind in _MAPPINGS:
        return {key: _copied(inner) for key, inner in value.items()}
    return kind(map(_copied, value)) if kind in _SEQUENCES else value


def _form(value: Any) -> Any:
    """What two values have in common of which one is a copy of the other."""
    kind = type(value)
    if isinstance(value, nn.Module):
        return kind
    if isinstance(value, MethodType):
        return value.__func__
    if isinstance(value, partial):
        return value.func, len(value.args), sorted(value.keywords)
    if kind in _SEQUENCES:
        return kind, [_form(inner) for inner in value]
    if kind in _MAPPINGS:
        return [(key, _form(inner)) for key, inner in value.items()]
    return value
