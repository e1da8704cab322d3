"""Containers that networks return."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def named_parts(value: Any) -> dict[Any, Any] | None:
    """What a mapping or a dataclass holds, by key or field; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return None
