"""Which networks there are, and of which there are released weights."""

import fnmatch
from collections.abc import Sequence

from senet import models
from senet.errors import UserError
from senet.models.registry import entry
from senet.weights.released import all_released


def list_models(
    pattern: str | Sequence[str] = "*",
    *,
    pretrained: bool = False,
    module: str | None = None,
    exclude: str | Sequence[str] = (),
) -> list[str]:
    """Names of the networks of this package, sorted.

    Args:
        pattern: shell pattern of names (`se_*`), or several, any of which shall match. With
            `pretrained` it may match with the tag or without.
        pretrained: names of released weights instead, with their tags
            (`se_resnet50.ra2_in1k`): each is a name for `create_model(name, pretrained=True)`.
        module: only networks of one family: a module of `senet.models` (`resnet`, `vgg`, …).
        exclude: patterns of names to leave out.

    Raises:
        UserError: no such family.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    without = [exclude] if isinstance(exclude, str) else list(exclude)
    families = {name: _family(name) for name in models.list_models()}
    if module is not None and module not in families.values():
        known = ", ".join(sorted(set(families.values())))
        raise UserError(f"module must be one of {known}, got {module!r}")
    names = [name for name, family in families.items() if module in (None, family)]
    if pretrained:
        full = {f"{r.network}.{r.tag}": r.network for r in all_released() if r.network in names}
    else:
        full = {name: name for name in names}
    return sorted(
        name
        for name, network in full.items()
        if any(_matches(name, network, each) for each in patterns)
        and not any(_matches(name, network, each) for each in without)
    )


def _matches(name: str, network: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(network, pattern)


def _family(name: str) -> str:
    return entry(name).builder.__module__.rpartition(".")[2]
