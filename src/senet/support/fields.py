"""Whether the values of a dataclass are of the types that its fields say, for files of them."""

from collections.abc import Sequence
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_origin


def misfit(value: object, kind: Any) -> str | None:
    """What a field of a type must be, if the value is something else; None: it fits.

    Args:
        value: of the field, from Python or TOML, whose arrays stand for tuples.
        kind: its type: bool, int, float, str, a Literal, a tuple of numbers, or one of them or
            None; of another only instances fit.
    """
    kinds = [each for each in get_args(kind) if each is not NoneType]
    if NoneType in get_args(kind):
        wanted = None if value is None else misfit(value, kinds[0])
        return None if wanted is None else f"{wanted}, or left out"
    if get_origin(kind) is Literal:
        return None if value in kinds else f"one of {', '.join(map(str, kinds))}"
    if get_origin(kind) is tuple:
        return _not_numbers(value, kinds)
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real)
        good = number and not isinstance(value, bool)
        return None if good else ("a whole number" if kind is int else "a number")
    if kind is str:
        return None if isinstance(value, str) else "text in quotes"
    return None if isinstance(value, kind) else f"a table of {kind.__name__}"


def _not_numbers(value: object, kinds: Sequence[Any]) -> str | None:
    """The same for a tuple: of so many numbers, or with ... of any number of them."""
    count = None if Ellipsis in kinds else len(kinds)
    what = "whole numbers" if kinds[0] is int else "numbers"
    many = {None: "a list of", 2: "two"}.get(count, str(count))
    good = (
        isinstance(value, list | tuple)
        and count in (None, len(value))
        and all(misfit(each, kinds[0]) is None for each in value)
    )
    return None if good else f"{many} {what}"
