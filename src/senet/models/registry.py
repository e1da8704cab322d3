"""Networks by name."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from senet.errors import UserError
from senet.models.network import Network, SEOptions

SE_OPTIONS = tuple(field.name for field in fields(SEOptions))
COMMON = ("num_classes", "in_channels", "se")
Builder = TypeVar("Builder", bound=Callable[..., Network])


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
    builder: Callable[..., Network]
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
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name, _REGISTRY, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else "`senet models` lists all"
        raise UserError(f"unknown model {name!r}; {hint}")
    return _REGISTRY[name]


def build_model(
    name: str, *, num_classes: int = 1000, in_channels: int = 3, **options: Any
) -> Network:
    """A freshly initialised network.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the head; 0 for none (the network returns pooled features).
        in_channels: channels of the images.
        **options: of SE networks reduction, squeeze, gate, integration, stages (`SEOptions`);
            of some networks their own, such as `variant` or `dropout`.

    Raises:
        UserError: unknown name, an option the network does not have, or a value out of range.
    """
    found = entry(name)
    if num_classes < 0:
        raise UserError(f"num_classes must be at least 0, got {num_classes}")
    if in_channels < 1:
        raise UserError(f"in_channels must be at least 1, got {in_channels}")
    for option in options:
        if option in found.options:
            continue
        if option in SE_OPTIONS:
            raise UserError(
                f"{name} has no SE blocks and so no option {option!r}; use {found.twin}"
            )
        raise UserError(
            f"{name} has no option {option!r}; its options: {', '.join(found.options) or 'none'}"
        )
    own = {key: value for key, value in options.items() if key not in SE_OPTIONS}
    try:
        se = (
            SEOptions(**{k: v for k, v in options.items() if k in SE_OPTIONS}) if found.se else None
        )
        model = found.builder(num_classes=num_classes, in_channels=in_channels, se=se, **own)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    model.config = {
        "name": name,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
    }
    return model
