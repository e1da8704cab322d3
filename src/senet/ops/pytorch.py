"""The operators by PyTorch's own functions, each a pass of its own over the map.

What a network without the operator runs: `F.batch_norm`, an activation, the gate, an addition. On a
GPU this is the faster way for small maps, whose kernels take less time than their launches: see
`senet.ops.choice`. Maps are rounded to their type after each function, the gate is computed in at
least float32 and rounded before it scales them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.ops.activations import ACTIVATIONS
from senet.ops.description import Momenta
from senet.ops.join import BATCH, NONE
from senet.ops.join import Arguments as JoinArguments
from senet.ops.maps import accumulator, spread
from senet.ops.reference import BatchNorm, excitation
from senet.ops.tail import Arguments as TailArguments
from senet.ops.tail import final_activation


def tail(a: TailArguments, momenta: Momenta) -> Tensor:
    """act(s ⊙ norm(x) + norm(shortcut)), each part only where given."""
    batch = a.normalization == "batch"
    v = a.x
    if a.normalization != "none":
        own = (a.weight, a.bias, a.running_mean, a.running_var)
        v = _batch_norm(v, BatchNorm(*own, eps=a.eps), batch, momenta[0])
    v = _scaled(v, a, "relu")
    if a.shortcut is not None:
        r = a.shortcut.to(v.dtype)
        if a.normalize_shortcut:
            other = (a.shortcut_weight, a.shortcut_bias, a.shortcut_mean, a.shortcut_var)
            r = _batch_norm(r, BatchNorm(*other, eps=a.shortcut_eps), batch, momenta[1])
        v = v + r
    return _activated(v, final_activation(a), a.negative_slope, in_place=v is not a.x)


def join(a: JoinArguments, momenta: Momenta) -> Tensor:
    """s ⊙ concat(act(norm(x_i))); a branch without norm has no activation."""
    norms = zip(a.weights, a.biases, a.means, a.variances, strict=True)
    parts = []
    for x, tensors, kind, eps, momentum in zip(
        a.maps, norms, a.normalizations, a.eps, momenta, strict=True
    ):
        v = x
        if kind != NONE:
            v = _batch_norm(x, BatchNorm(*tensors, eps=eps), kind == BATCH, momentum)
            v = _activated(v, a.activation, a.negative_slope, in_place=True)
        parts.append(v)
    return _scaled(parts[0] if len(parts) == 1 else torch.cat(parts, 1), a, a.hidden_activation)


def _batch_norm(x: Tensor, norm: BatchNorm, batch: bool, momentum: float | None) -> Tensor:
    """As `reference.batch_norm`, by F.batch_norm."""
    weight, bias, *running, _, eps = norm
    moves = batch and momentum is not None
    kept = running if moves or not batch else [None, None]
    exact = accumulator(x.dtype)
    weight, bias, mean, var = (None if t is None else t.to(exact) for t in (weight, bias, *kept))
    y = F.batch_norm(x, mean, var, weight, bias, batch, momentum or 0.0, eps)
    for own, moved in zip(kept, (mean, var), strict=True):
        if moves and own is not None and moved is not None and own is not moved:
            with torch.no_grad():  # of another type
                own.copy_(moved)
    return y


def _activated(v: Tensor, name: str, negative_slope: float, *, in_place: bool) -> Tensor:
    """An activation of v, which nobody reads afterwards if `in_place`."""
    if name == "relu" and in_place:
        return v.relu_()
    return ACTIVATIONS[name](v, negative_slope)


def _scaled(v: Tensor, a: TailArguments | JoinArguments, hidden_activation: str) -> Tensor:
    """s ⊙ v; without a gate v."""
    if a.w1 is None or a.w2 is None:
        return v
    z = v.flatten(2).mean(2, dtype=accumulator(v.dtype))
    s = excitation(z, a.w1, a.b1, a.w2, a.b2, a.gate, hidden_activation)
    return v * spread(s.to(v.dtype), v)
