"""The fields of a recipe as flags, with the help that its docstring gives."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import docstring_parser
from cyclopts import Group, Parameter, Token

from senet.cli.converters import whole
from senet.data.augmentation import Augmentation
from senet.training.recipe import Recipe

OFF = "off"
"""Stands for None, which a flag that was not given has."""
_AUGMENTATION = "Augmentation"


def flags_of_recipe(first: Group) -> type:
    """A dataclass with an optional field for each of `Recipe` and of `Augmentation`.

    Args:
        first: the group that they follow in a help, a group for each kind of field.
    """
    groups: dict[str, Group] = {}
    found = []
    for owner in (Recipe, Augmentation):
        helps = helps_of(owner)
        for each in dataclasses.fields(owner):
            if each.name in ("name", "augmentation"):
                continue
            kind = group_of(each)
            key = float(first.sort_key) + (len(groups) + 1) / 100
            group = groups.setdefault(kind, Group(f"Recipe: {kind}", sort_key=key))
            parameter = Parameter(
                name=flags_of(each), help=helps[each.name], group=group, **_reading(each.type)
            )
            shown = Annotated[_base(each.type) | None, parameter]  # type: ignore[valid-type]
            found.append((each.name, shown, dataclasses.field(default=None)))
    return dataclasses.make_dataclass("GivenRecipe", found, frozen=True, kw_only=True)


def group_of(each: "dataclasses.Field[Any]") -> str:
    """Under which heading a field is shown."""
    return each.metadata.get("group", _AUGMENTATION)


def flags_of(each: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """Its flags, the one that is shown first; its own name is one, for files of flags."""
    names = (each.metadata.get("flag"), each.name, each.metadata.get("alias"))
    return tuple(f"--{name.replace('_', '-')}" for name in names if name)


def helps_of(owner: type) -> dict[str, str]:
    """What the docstring of a class says of each of its attributes."""
    parsed = docstring_parser.parse(owner.__doc__ or "")
    texts = {each.arg_name: " ".join((each.description or "").split()) for each in parsed.params}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def _base(kind: Any) -> Any:
    """The type without its None."""
    rest = [each for each in get_args(kind) if each is not NoneType]
    return rest[0] if NoneType in get_args(kind) else kind


def _reading(kind: Any) -> dict[str, Any]:
    """How a flag of a type is read."""
    base, optional = _base(kind), NoneType in get_args(kind)
    if get_origin(base) is tuple:
        read = whole if int in get_args(base) else _number
        return {"converter": partial(_several, read, optional), "n_tokens": 1, "negative": ""}
    if base is int:
        return {"converter": partial(_one, whole, optional)}
    if base is float:
        return {"converter": partial(_one, _number, optional)}
    return {}


def _number(_type: Any, tokens: Sequence[Token]) -> float:
    try:
        return float(tokens[0].value)
    except ValueError:
        raise ValueError(f"must be a number, got {tokens[0].value!r}") from None


Read = Callable[[Any, Sequence[Token]], Any]


def _one(read: Read, optional: bool, kind: Any, tokens: Sequence[Token]) -> Any:
    if optional and tokens[0].value.lower() == "none":
        return OFF
    return read(kind, tokens)


def _several(read: Read, optional: bool, kind: Any, tokens: Sequence[Token]) -> Any:
    """Numbers separated by commas, or a TOML array of them."""
    parts = [part.strip() for token in tokens for part in token.value.split(",")]
    if optional and parts == ["none"]:
        return OFF
    return tuple(read(kind, [Token(value=part)]) for part in parts)
