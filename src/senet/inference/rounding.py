"""How far another order of summation may be from a network's own result."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from senet.inference.outputs import tensors

# How much further off than the network's own rounding a result may be.
_FACTOR = 10
# What a caller tells apart; a list or a dict of a class of its own may have become a plain one.
_KINDS = (Tensor, Mapping, list, tuple)


def difference(found: Any, wanted: Any) -> float:
    """Largest difference of two outputs, relative to the largest number in the second.

    Whole numbers and masks are not compared by value: where rounding changes which of two nearly
    equal numbers is larger, a class or a mask may be any other.

    Args:
        found: tensors in any nesting of containers, see `senet.inference.outputs.tensors`.
        wanted: the same nesting.

    Returns:
        inf if anything is not finite, or of another shape or dtype, or in other containers.
    """
    if not _alike(found, wanted):
        return math.inf
    pairs = zip(tensors(found), tensors(wanted), strict=True)
    return max((_distance(x, y) for x, y in pairs), default=0.0)


def _alike(found: Any, wanted: Any) -> bool:
    """Whether both are tensors of one shape and dtype, or hold such in containers of one kind."""
    if any(isinstance(found, kind) != isinstance(wanted, kind) for kind in _KINDS):
        return False
    if isinstance(wanted, Tensor):
        return bool(found.shape == wanted.shape and found.dtype == wanted.dtype)
    if isinstance(wanted, Mapping):
        keys = list(found) == list(wanted)
        return keys and all(_alike(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(_alike, found, wanted))
    return _alike(list(tensors(found)), list(tensors(wanted)))


def _distance(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return math.inf
    if not y.is_floating_point() or not y.numel():
        return 0.0
    scale = max(float(y.abs().max()), torch.finfo(y.dtype).tiny)
    found = float((x - y).abs().max()) / scale
    return found if math.isfinite(found) else math.inf


@torch.no_grad()
def allowed(model: nn.Module, x: Tensor, wanted: Any, tolerance: float) -> float:
    """The largest difference from `wanted` that rounding explains.

    A deep network with fresh weights may amplify rounding a thousandfold: then its own result is as
    far from the exact one as any other order of summation. That is measured in float64, on the CPU.

    Args:
        model: network in evaluation mode.
        x: input of it.
        wanted: what it returns for x.
        tolerance: what is allowed in any case.

    Returns:
        `tolerance`, or ten times the network's own distance from float64 where that is more.
    """
    exact = copy.deepcopy(model).cpu().double()(x.detach().cpu().to(torch.float64, copy=True))
    pairs = list(zip(tensors(wanted), tensors(exact), strict=True))
    own = max((_distance(a.cpu().double(), b.double()) for a, b in pairs), default=0.0)
    return max(tolerance, _FACTOR * own) if math.isfinite(own) else tolerance
