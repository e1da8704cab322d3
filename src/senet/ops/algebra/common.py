"""What the closed forms share: statistics, sums over pixels, the gate and its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.ops.maps import spread
from senet.ops.reference import activate, gate_value


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mean per image (N,C); mean, inv_std and unbiased var (C,) over all images.

    Sums are taken of x minus its first pixel, so that a large mean costs no digits and a constant
    channel is exact.
    """
    axes = (0, *range(2, x.ndim))
    pivot = x.detach().flatten(2)[0, :, 0]
    pivot = torch.where(pivot.isfinite(), pivot, 0)
    shifted = x - spread(pivot, x)
    squeezed = pixel_mean(shifted)
    mean = squeezed.mean(0)
    biased = (shifted - spread(mean, x)).square().mean(axes)
    count = x.numel() // x.shape[1]
    unbiased = biased * (count / max(count - 1, 1))
    return squeezed + pivot, (mean + pivot, torch.rsqrt(biased + eps), unbiased)


def running_statistics(
    mean: Tensor | None, var: Tensor | None, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, inv_std and var (C,) from the running statistics."""
    assert mean is not None
    assert var is not None
    return mean.to(dtype), torch.rsqrt(var.to(dtype) + eps), var.to(dtype)


def pixel_mean(x: Tensor) -> Tensor:
    """Mean (N,C) of x (N,C,*)."""
    return x.mean(tuple(range(2, x.ndim)))


def pixel_sum(x: Tensor) -> Tensor:
    """Sum (N,C) of x (N,C,*)."""
    return x.sum(tuple(range(2, x.ndim)))


def gate_slope(s: Tensor, gate: str) -> Tensor:
    """The gate's derivative, from its value s."""
    match gate:
        case "sigmoid":
            return s * (1 - s)
        case "tanh":
            return 1 - s * s
        case "relu":
            return (s > 0).to(s.dtype)
        case "hard_sigmoid":
            return ((s > 0) & (s < 1)).to(s.dtype) / 6
        case _:
            return s * (1 - s / 2)


def through(gradient: Tensor, u: Tensor, activation: str, negative_slope: float = 0.0) -> Tensor:
    """The gradient of u from that of its activation, one of `BRANCH_ACTIVATIONS`."""
    match activation:
        case "linear":
            return gradient
        case "relu":
            return torch.where(u <= 0, 0, gradient)
        case "relu6":
            return torch.where((u <= 0) | (u >= 6), 0, gradient)
        case "leaky_relu":
            return torch.where(u > 0, gradient, gradient * negative_slope)
        case "silu":
            s = torch.sigmoid(u)
            return gradient * (s + u * s * (1 - s))
        case "hardswish":
            return gradient * torch.where(u <= -3, 0, torch.where(u >= 3, 1, u / 3 + 0.5))
        case _:
            bell = torch.exp(u * u * -0.5) * (2 * torch.pi) ** -0.5
            return gradient * (0.5 * torch.erfc(u * -(0.5**0.5)) + u * bell)


def excite(
    z: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: str,
    hidden_activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """Hidden (N,h) and gates (N,C) of a squeeze z (N,C).

    Hidden is what the hidden activation sees; of "relu", which needs no more, what it gives.
    """
    first, second = (None if b is None else b.to(z.dtype) for b in (b1, b2))
    hidden = F.linear(z, w1.flatten(1).to(z.dtype), first)
    active = activate(hidden, hidden_activation)
    s = gate_value(F.linear(active, w2.flatten(1).to(z.dtype), second), gate)
    return active if hidden_activation == "relu" else hidden, s


def excite_backward(
    ds: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    gates: Tensor,
    gate: str,
    hidden_activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z (N,C) and of what δ (N,h) and the gate (N,C) see, from the gates'."""
    dt = ds * gate_slope(gates, gate)
    dhidden = through(dt @ w2.flatten(1).to(dt.dtype), hidden, hidden_activation)
    return dhidden @ w1.flatten(1).to(dt.dtype), dhidden, dt


def map_gradient(
    g: Tensor, x: Tensor, statistics: Tensor, scale: Tensor, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dx of a batch normalization with gain `scale` = weight * inv_std, from the gradient g.

    dweight and dbias (C,) are those of its parameters.
    """
    count = x.numel() // x.shape[1]
    centred = x - spread(statistics[0], x)
    slope = -scale * statistics[1] * dweight / count
    return spread(scale, x) * g + spread(slope, x) * centred - spread(scale * dbias / count, x)
