"""How far another order of summation may be from a network's own result."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from senet.inference.outputs import tensors

# How much further off than the network's own rounding a result may be.
_FACTOR = 10


def difference(found: Any, wanted: Any) -> float:
    """Largest difference of two outputs, relative to the largest number in the second.

    Args:
        found: tensors in any nesting of containers, see `senet.inference.outputs.tensors`.
        wanted: the same nesting.

    Returns:
        inf if anything is not finite, or of another shape.
    """
    worst = 0.0
    for x, y in zip(tensors(found), tensors(wanted), strict=True):
        if x.shape != y.shape:
            return math.inf
        if y.is_floating_point() and y.numel():
            scale = max(float(y.abs().max()), torch.finfo(y.dtype).tiny)
            found = float((x - y).abs().max()) / scale
            worst = max(worst, found) if math.isfinite(found) else math.inf
    return worst


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
    own = difference([t.cpu().double() for t in tensors(wanted)], exact)
    return max(tolerance, _FACTOR * own) if math.isfinite(own) else tolerance
