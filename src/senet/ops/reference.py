"""The equations of the paper in plain PyTorch: slow, obvious, the oracle of the other ways.

Every map is computed in the accumulation type (float32 for 16-bit storage) and rounded once at the
end; gradients of any order come from autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.ops.activations import Activation
from senet.ops.depthwise_convolution import Arguments as DepthwiseArguments
from senet.ops.description import Momenta
from senet.ops.join import BATCH, NONE
from senet.ops.join import Arguments as JoinArguments
from senet.ops.maps import accumulator, full_precision, spread
from senet.ops.tail import Arguments as TailArguments
from senet.ops.tail import final_activation

GATES = ("sigmoid", "tanh", "relu", "hard_sigmoid", "identity_sigmoid")
# Of the closed set of `senet.ops.activations`, what stands between a norm and its SE block or
# behind an addition, and between the block's two layers.
BRANCH_ACTIVATIONS = ("linear", "relu", "relu6", "silu", "hardswish", "gelu", "leaky_relu")
HIDDEN_ACTIVATIONS = ("relu", "silu", "hardswish")


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


def activate(u: Tensor, name: str, negative_slope: float = 0.0) -> Tensor:
    """One of `BRANCH_ACTIVATIONS` of each element of u."""
    if name == "hardswish":
        return u * (F.relu6(u + 3) / 6)  # F.hardswish rounds 1/6 to float32 in float64
    return Activation(name, negative_slope)(u)


def excitation(
    z: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: str,
    hidden_activation: str = "relu",
) -> Tensor:
    """s = gate(W2 δ(W1 z + b1) + b2), eq. 3; z (N,C), w1 (h,C), w2 (C,h) → (N,C)."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(z.dtype)

    with full_precision(z.device.type):
        hidden = activate(F.linear(z, w1.flatten(1).to(z.dtype), cast(b1)), hidden_activation)
        return gate_value(F.linear(hidden, w2.flatten(1).to(z.dtype), cast(b2)), gate)


def scaled(x: Tensor, a: TailArguments | JoinArguments, hidden_activation: str = "relu") -> Tensor:
    """s ⊙ x with s = excitation(mean of x over its pixels), eq. 2 to 4; without a gate x."""
    if a.w1 is None or a.w2 is None:
        return x
    z = x.flatten(2).mean(2)
    return x * spread(excitation(z, a.w1, a.b1, a.w2, a.b2, a.gate, hidden_activation), x)


def batch_norm(x: Tensor, norm: BatchNorm, own: bool, momentum: float | None) -> Tensor:
    """Normalize x (N,C,*spatial) per channel.

    Args:
        x: in the accumulation type.
        norm: weight, bias, running statistics and eps.
        own: by the statistics of x, and not by the running ones.
        momentum: moves the running statistics, if there are any, by that; None leaves them.
    """
    weight, bias, running_mean, running_var, _, eps = norm
    if own or running_mean is None or running_var is None:
        axes = (0, *range(2, x.ndim))
        mean = x.mean(axes)
        var = (x - spread(mean, x)).square().mean(axes)
        if momentum is not None and running_mean is not None and running_var is not None:
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


def tail(a: TailArguments, momenta: Momenta) -> Tensor:
    """act(s ⊙ norm(x) + norm(shortcut)), each part only where given."""
    v = a.x.to(accumulator(a.x.dtype))
    own = a.normalization == "batch"
    if a.normalization != "none":
        norm = BatchNorm(a.weight, a.bias, a.running_mean, a.running_var, eps=a.eps)
        v = batch_norm(v, norm, own, momenta[0])
    v = scaled(v, a)
    if a.shortcut is not None:
        r = a.shortcut.to(v.dtype)
        if a.normalize_shortcut:
            parameters = (a.shortcut_weight, a.shortcut_bias, a.shortcut_mean, a.shortcut_var)
            r = batch_norm(r, BatchNorm(*parameters, eps=a.shortcut_eps), own, momenta[1])
        v = v + r
    return activate(v, final_activation(a), a.negative_slope).to(a.x.dtype)


def join(a: JoinArguments, momenta: Momenta) -> Tensor:
    """s ⊙ concat(act(norm(x_i))); a branch without norm has no activation."""
    norms = zip(a.weights, a.biases, a.means, a.variances, strict=True)
    branches = zip(a.maps, norms, a.normalizations, a.eps, momenta, strict=True)
    parts = []
    for x, tensors, kind, eps, momentum in branches:
        v = x.to(accumulator(x.dtype))
        if kind != NONE:
            v = batch_norm(v, BatchNorm(*tensors, eps=eps), kind == BATCH, momentum)
            v = activate(v, a.activation, a.negative_slope)
        parts.append(v)
    return scaled(torch.cat(parts, 1), a, a.hidden_activation).to(a.maps[0].dtype)


def depthwise(a: DepthwiseArguments, _: Momenta) -> Tensor:
    """Each channel's map by its own kernel, tap by tap."""
    k, s = a.weight.shape[-1], a.stride
    x = F.pad(a.x.to(accumulator(a.x.dtype)), (a.padding,) * 4)
    rows, columns = ((side - k) // s + 1 for side in x.shape[2:])
    taps = [
        x[:, :, i : i + s * rows : s, j : j + s * columns : s][:, :, :rows, :columns]
        * spread(a.weight[:, 0, i, j].to(x.dtype), x)
        for i in range(k)
        for j in range(k)
    ]
    return torch.stack(taps).sum(0).to(a.x.dtype)
