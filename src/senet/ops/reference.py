"""The equations of the paper in plain PyTorch: slow, obvious, the oracle of the other ways.

Every map is computed in the accumulation type (float32 for 16-bit storage) and rounded once at the
end; gradients come from autograd. Double backward works here and nowhere else in `senet.ops`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = ("sigmoid", "tanh", "relu", "hard_sigmoid", "identity_sigmoid")


class BatchNorm(NamedTuple):
    """Parameters of a batch normalization over axis 1, as in `torch.nn.BatchNorm2d`.

    Attributes:
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        running_mean: (C,), updated in training, or None.
        running_var: (C,), updated in training with the unbiased variance, or None.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float = 0.1
    eps: float = 1e-5


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums over elements of `dtype` are kept in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Context without autocast; nothing at all (also in a graph) where autocast is not on."""
    available = torch.amp.is_autocast_available(device_type)  # not on "meta"
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def gate_value(t: Tensor, gate: str) -> Tensor:
    """sigma of eq. 3: one of `GATES` applied to `t`; identity_sigmoid is 2 * sigmoid, 1 at 0."""
    match gate:
        case "sigmoid":
            return torch.sigmoid(t)
        case "tanh":
            return torch.tanh(t)
        case "relu":
            return F.relu(t)
        case "hard_sigmoid":
            return F.relu6(t + 3) / 6  # F.hardsigmoid rounds 1/6 to float32 in float64
        case _:
            return 2 * torch.sigmoid(t)


def excitation(
    z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, gate: str
) -> Tensor:
    """s = gate(W2 relu(W1 z + b1) + b2), eq. 3; z (N,C), w1 (h,C), w2 (C,h) → (N,C)."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(z.dtype)

    with full_precision(z.device.type):
        hidden = F.relu(F.linear(z, w1.flatten(1).to(z.dtype), cast(b1)))
        return gate_value(F.linear(hidden, w2.flatten(1).to(z.dtype), cast(b2)), gate)


def spread(t: Tensor, like: Tensor) -> Tensor:
    """Give t (N,C) or (C,) the trailing axes of `like` (N,C,*spatial), each of size 1."""
    return t.reshape(*t.shape, *(1,) * (like.ndim - 2))


def squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, gate: str = "sigmoid"
) -> Tensor:
    """y = s ⊙ x, s = excitation(mean of x over its pixels): eq. 2, 3 and 4."""
    u = x.to(accumulator(x.dtype))
    s = excitation(u.flatten(2).mean(2), w1, b1, w2, b2, gate)
    return (spread(s, u) * u).to(x.dtype)


def batch_norm(x: Tensor, norm: BatchNorm, training: bool) -> Tensor:
    """Normalize x (N,C,*spatial) per channel, by its own statistics in training."""
    weight, bias, running_mean, running_var, momentum, eps = norm
    if training or running_mean is None or running_var is None:
        axes = (0, *range(2, x.ndim))
        mean = x.mean(axes)
        var = (x - spread(mean, x)).square().mean(axes)
        if running_mean is not None and running_var is not None:
            count = x.numel() // x.shape[1]
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean), momentum)
                running_var.lerp_((var * count / (count - 1)).to(running_var), momentum)
    else:
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)
    y = (x - spread(mean, x)) * spread(torch.rsqrt(var + eps), x)
    if weight is not None:
        y = y * spread(weight.to(x.dtype), x)
    return y if bias is None else y + spread(bias.to(x.dtype), x)


def bn_se_add_relu(
    x: Tensor,
    shortcut: Tensor | None,
    norm: BatchNorm,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    *,
    training: bool,
    gate: str,
    relu: bool,
    shortcut_norm: BatchNorm | None,
) -> Tensor:
    """relu(s ⊙ BN(x) + shortcut), s = excitation(mean of BN(x)); each part only where given."""
    v = batch_norm(x.to(accumulator(x.dtype)), norm, training)
    if w1 is not None and w2 is not None:
        v = v * spread(excitation(v.flatten(2).mean(2), w1, b1, w2, b2, gate), v)
    if shortcut is not None:
        r = shortcut.to(v.dtype)
        v = v + (r if shortcut_norm is None else batch_norm(r, shortcut_norm, training))
    return (F.relu(v) if relu else v).to(x.dtype)


def bn_relu_concat_se(
    maps: list[Tensor],
    norms: list[BatchNorm | None],
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    *,
    training: list[bool],
    gate: str,
) -> Tensor:
    """s ⊙ concat(relu(BN(x_i))), s = excitation(mean of the concat); no norm: no ReLU."""
    wide = [x.to(accumulator(x.dtype)) for x in maps]
    v = torch.cat(
        [
            x if norm is None else F.relu(batch_norm(x, norm, own))
            for x, norm, own in zip(wide, norms, training, strict=True)
        ],
        1,
    )
    if w1 is not None and w2 is not None:
        v = v * spread(excitation(v.flatten(2).mean(2), w1, b1, w2, b2, gate), v)
    return v.to(maps[0].dtype)
