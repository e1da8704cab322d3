"""What became of each SE block of a network, by the count of `senet.anatomy`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, nn

from senet.anatomy import Excitation, excitations
from senet.inference.report import FUSED


def outcomes(
    model: nn.Module, x: Tensor, gated: Collection[str], left: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """Each SE block of a network, and "fused" or why it is not.

    Args:
        model: the original network.
        x: images.
        gated: modules with a product of a map and gates that runs with other work now.
        left: modules that were left as they are, and why.
    """
    return {name: _outcome(e, gated, list(left)) for name, e in excitations(model, x).items()}


def _outcome(e: Excitation, gated: Collection[str], left: list[tuple[str, str]]) -> str:
    places = {e.name, *(site.module for site in e.sites)}
    if places & set(gated):
        return FUSED
    for name, why in left:
        if any(place == name or place.startswith(f"{name}.") for place in places):
            return why
    if not e.places or len(e.places) != 2:
        return f"its map has {len(e.places)} spatial dimensions"
    if e.squeeze == "none":
        return "each position has gates of its own"
    return f"its program is not known: {e.squeeze}, {', '.join(map(str, e.program))}, {e.gate}"
