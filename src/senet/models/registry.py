"""Networks by name."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from senet.errors import UserError
from senet.models.elsewhere import split_tag, why_not
from senet.models.options import SE_OPTIONS

COMMON = ("num_classes", "in_channels", "se")
Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Entry:
    """A registered network.

    Attributes:
        name: its name.
        twin: the name of the same network with SE where this is plain, and the other way round.
        builder: makes it.
        se: whether it has SE blocks.
        options: names of its options.
    """

    name: str
    twin: str
    builder: Callable[..., nn.Module]
    se: bool
    options: tuple[str, ...]


_REGISTRY: dict[str, Entry] = {}


def register(se_name: str | None = None) -> Callable[[Builder], Builder]:
    """Register a network under its function's name and, with SE, under `se_name`.

    The builder takes num_classes, in_channels, se (`SEOptions` or None) and its own options,
    which become options of both networks.

    Args:
        se_name: name of the network with SE; `se_` + the function's name by default.
    """

    def add(builder: Builder) -> Builder:
        plain, se = builder.__name__, se_name or f"se_{builder.__name__}"
        own = tuple(
            parameter.name
            for parameter in inspect.signature(builder).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in COMMON
        )
        _REGISTRY[plain] = Entry(plain, se, builder, False, own)
        _REGISTRY[se] = Entry(se, plain, builder, True, (*SE_OPTIONS, *own))
        return builder

    return add


def list_models(pattern: str = "*") -> list[str]:
    """Names of all networks that match a shell pattern (`se_*`), sorted."""
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def entry(name: str) -> Entry:
    """The registered network of that name.

    Raises:
        UserError: no such network; the message names the closest one.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    asked = split_tag(name)
    if asked.name in _REGISTRY:
        wanted = ", ".join(f"{key}={value!r}" for key, value in asked.options.items())
        raise UserError(
            f"{name} is timm's name of {asked.name}: give that{f' with {wanted}' if wanted else ''}"
        )
    close = difflib.get_close_matches(asked.name, _REGISTRY, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "`senet models` lists all"
    raise UserError(f"unknown model {name!r}{why_not(asked.name)}; {hint}")
