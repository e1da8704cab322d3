"""The networks whose training steps, and on a GPU inference, are compared: ours and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from senet.anatomy import excitations
from senet.bench.setting import Device
from senet.errors import UserError
from senet.fusion import fuse
from senet.networks.anywhere import WITHOUT_SE, is_foreign, open_source
from senet.networks.create import create_model
from senet.support.extras import optional

OURS, OURS_PLAIN = "senet se_resnet50", "senet resnet50"


@dataclass(frozen=True)
class Entrant:
    """A network of a benchmark, for ImageNet.

    Attributes:
        make: gives it with fresh weights.
        compiled: whether it runs under torch.compile.
        ours: whether it is of this package, whose inference `senet.optimize` prepares.
    """

    make: Callable[[], nn.Module]
    compiled: bool = False
    ours: bool = False


def _timm(name: str) -> Entrant:
    def make() -> nn.Module:
        return optional("timm").create_model(name)

    return Entrant(make)


def _torchvision() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


_SENET = {
    OURS: Entrant(partial(create_model, "se_resnet50"), ours=True),
    OURS_PLAIN: Entrant(partial(create_model, "resnet50"), ours=True),
}
_EAGER = _SENET | {"timm seresnet50": _timm("seresnet50"), "timm resnet50": _timm("resnet50")}
ENTRANTS: Mapping[Device, Mapping[str, Entrant]] = {
    "cpu": {
        **_SENET,
        "timm seresnet50 eager": _timm("seresnet50"),
        "timm seresnet50 compiled": replace(_timm("seresnet50"), compiled=True),
        "torchvision resnet50 eager": Entrant(_torchvision),
    },
    "cuda": {
        **_EAGER,
        **{f"{name} compiled": replace(each, compiled=True) for name, each in _EAGER.items()},
    },
}


def entrants(device: Device, *, compiled: bool) -> dict[str, Entrant]:
    """The contestants on a device by name, ours first; `compiled`: also under torch.compile."""
    return {name: each for name, each in ENTRANTS[device].items() if compiled or not each.compiled}


def entrants_of(name: str, *, compiled: bool) -> dict[str, Entrant]:
    """A network of timm, torchvision or a file: fused, fused without its SE, as it is, compiled.

    Raises:
        UserError: no such network, or one of ours, which is fused by itself.
    """
    if not is_foreign(name):
        raise UserError(
            f"--models of 'train' takes timm:NAME, torchvision:NAME or FILE.py:FUNCTION, not {name}"
        )
    plain = partial(open_source, name)
    found = {f"senet.fuse {name}": Entrant(partial(_fused, name), ours=True)}
    if excitations(plain()):
        found[f"senet.fuse {name} without SE"] = Entrant(partial(_fused, name, se=False), ours=True)
    found[f"{name} eager"] = Entrant(plain)
    if compiled:
        found[f"{name} compiled"] = Entrant(plain, compiled=True)
    return found


def _fused(name: str, *, se: bool = True) -> nn.Module:
    model = open_source(name) if se else open_source(name, **{WITHOUT_SE: True})
    size: tuple[int, ...] = model.input_size  # type: ignore[assignment]  # see open_source
    fuse(model, torch.zeros(1, *size))
    return model
