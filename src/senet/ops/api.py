"""The functions that layers call: arguments checked, an implementation chosen, the operator run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.errors import UserError
from senet.ops import checks, depthwise_convolution, join, tail
from senet.ops.activations import Activation
from senet.ops.choice import resolve, resolve_maps
from senet.ops.cpu.depthwise import KERNELS
from senet.ops.maps import memory_format
from senet.ops.operators import DEPTHWISE, JOIN, TAIL
from senet.ops.reference import BatchNorm

_NO_NORM = BatchNorm(None, None, None, None)
# What a name alone means: nn.LeakyReLU's slope, and "none" as another name of "linear".
_BY_NAME = {"leaky_relu": Activation("leaky_relu", 0.01), "none": Activation("linear")}


def _activation(given: str | Activation) -> Activation:
    return _BY_NAME.get(given, Activation(given)) if isinstance(given, str) else given


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: str = "sigmoid",
    *,
    hidden_activation: str = "relu",
) -> Tensor:
    """y = s ⊙ x with s = gate(W2 δ(W1 mean(x) + b1) + b2): equations 2 to 4 of the paper.

    The mean and the gate are computed in at least float32, also under autocast.

    Args:
        x: (N,C,*spatial) with one to three spatial axes; channels_last is the fast layout.
        w1: (h,C), or (h,C,1,1) as of a 1x1 convolution.
        b1: (h,) or None.
        w2: (C,h) or (C,h,1,1).
        b2: (C,) or None.
        gate: "sigmoid", "tanh", "relu", "hard_sigmoid" or "identity_sigmoid" (2 * sigmoid).
        hidden_activation: δ: "relu", "silu" or "hardswish".

    Returns:
        (N,C,*spatial), dtype and layout of x.

    Raises:
        UserError: shapes that do not fit, an unknown gate, or an implementation chosen with `use`
            that cannot take x.
    """
    if not torch.jit.is_tracing():  # sizes are tensors there, and comparing them warns
        checks.check_maps(x, None)
        checks.check_gate(x.shape[1], w1, b1, w2, b2, gate)
    checks.check_activations(Activation("linear"), hidden_activation)
    if hidden_activation != "relu":
        nothing: list[Tensor | None] = [None]
        joined = join.Arguments(
            [x],
            *(nothing,) * 4,
            *(w1, b1, w2, b2),
            normalizations=[join.NONE],
            eps=[0.0],
            hidden_activation=hidden_activation,
            gate=gate,
        )
        return JOIN.run(resolve_maps(x), joined, (None,))
    arguments = tail.Arguments(x, w1=w1, b1=b1, w2=w2, b2=b2, gate=gate)
    return TAIL.run(resolve_maps(x), arguments, (None, None))


def bn_se_add_relu(
    x: Tensor,
    shortcut: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    gate: str = "sigmoid",
    relu: bool = True,
    activation: str | Activation = "relu",
    shortcut_norm: BatchNorm | None = None,
) -> Tensor:
    """y = relu(s ⊙ BN(x) + shortcut), s the squeeze-and-excitation gate of BN(x).

    Parts are left out by None or False: no gate (w1, b1, w2, b2 None) gives BN → add → ReLU, no
    shortcut BN → SE → ReLU, `relu=False` no ReLU. For the backward pass only x and y are kept
    (without a shortcut, with a normalized one or another activation, x and the shortcut).

    Args:
        x: (N,C,*spatial) with one to three spatial axes; channels_last is the fast layout.
        shortcut: like x, or None.
        bn_weight: (C,), or None for 1.
        bn_bias: (C,), or None for 0.
        running_mean: (C,) or None; updated in training, used otherwise.
        running_var: (C,) or None; updated in training with the unbiased variance.
        w1: (h,C), or (h,C,1,1) as of a 1x1 convolution; None for no gate.
        b1: (h,) or None.
        w2: (C,h) or (C,h,1,1); None for no gate.
        b2: (C,) or None.
        training: normalize by the batch's statistics. Without running statistics this is done
            always, as `torch.nn.BatchNorm2d` does.
        momentum: weight of the batch in the running statistics (the cumulative average of
            `BatchNorm2d(momentum=None)` is the caller's to resolve).
        eps: added to the variance.
        gate: as in `squeeze_excite`; not used without w1 and w2.
        relu: whether the ReLU, or the activation in its place, is applied.
        activation: in the place of the ReLU, as in `bn_act_se`.
        shortcut_norm: normalization of the shortcut (a projection's), in the same pass.

    Returns:
        (N,C,*spatial), layout of x, dtype that x + shortcut has.

    Raises:
        UserError: shapes that do not fit, an unknown gate or activation, an activation with
            `relu=False`, or an implementation chosen with `use` that cannot take x.
        ValueError: batch statistics of a single value per channel.
    """
    behind = _activation(activation)
    checks.check_activations(behind, "relu")
    if not relu and behind.name != "relu":
        raise UserError(f"activation {behind.name!r} is given with relu=False, which is for none")
    norm = BatchNorm(bn_weight, bn_bias, running_mean, running_var, momentum, eps)
    batch = training or running_mean is None
    if not torch.jit.is_tracing():  # sizes are tensors there, and comparing them warns
        checks.check_maps(x, shortcut)
        checks.check_gate(x.shape[1], w1, b1, w2, b2, gate)
        checks.check_norms(x, shortcut, norm, shortcut_norm, batch, training)
    if shortcut is not None and shortcut.dtype != x.dtype:
        common = torch.promote_types(x.dtype, shortcut.dtype)
        x, shortcut = x.to(common), shortcut.to(common)
    other = shortcut_norm or _NO_NORM
    arguments = tail.Arguments(
        x,
        shortcut,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        other.weight,
        other.bias,
        other.running_mean,
        other.running_var,
        w1,
        b1,
        w2,
        b2,
        normalization="batch" if batch else "running",
        normalize_shortcut=shortcut_norm is not None,
        eps=eps,
        shortcut_eps=other.eps,
        gate=gate,
        relu=relu and behind.name == "relu",
        activation="linear" if behind.name == "relu" else behind.name,
        negative_slope=behind.parameter,
    )
    moved = shortcut_norm.momentum if training and shortcut_norm is not None else None
    return TAIL.run(resolve_maps(x), arguments, (momentum if training else None, moved))


def bn_act_se(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | Activation,
    hidden_activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """y = s ⊙ v with v = act(BN(x)) and s the squeeze-and-excitation gate of v: MBConv's order.

    The sums of the squeeze are taken before y is written; v never exists. For the backward pass
    only x is kept.

    Args:
        x: (N,C,*spatial) with one to three spatial axes; channels_last is the fast layout.
        bn_weight: (C,), or None for 1.
        bn_bias: (C,), or None for 0.
        running_mean: (C,) or None; updated in training, used otherwise.
        running_var: (C,) or None; updated in training with the unbiased variance.
        w1: (h,C), or (h,C,1,1) as of a 1x1 convolution; None for no gate (s = 1).
        b1: (h,) or None.
        w2: (C,h) or (C,h,1,1); None for no gate.
        b2: (C,) or None.
        training: normalize by the batch's statistics. Without running statistics this is done
            always, as `torch.nn.BatchNorm2d` does.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        activation: "relu", "relu6", "silu", "hardswish", "gelu", "leaky_relu" (slope 0.01; of
            another slope `senet.ops.Activation("leaky_relu", slope)`), "linear" or "none".
        hidden_activation: of the gate: "relu", "silu" or "hardswish"; like `gate` not used without
            w1 and w2.
        gate: as in `squeeze_excite`.

    Returns:
        (N,C,*spatial), dtype and layout of x.

    Raises:
        UserError: shapes that do not fit, an unknown activation or gate, or an implementation
            chosen with `use` that cannot take x.
        ValueError: batch statistics of a single value per channel.
    """
    activation = _activation(activation)
    checks.check_activations(activation, hidden_activation)
    norm = BatchNorm(bn_weight, bn_bias, running_mean, running_var, momentum, eps)
    batch = training or running_mean is None
    # A mean commutes with a norm alone, and `recomputed` knows BN → ReLU of the tail.
    as_tail = activation.name == "linear" or (activation.name == "relu" and w1 is None)
    if as_tail and (w1 is None or hidden_activation == "relu"):
        return bn_se_add_relu(
            x,
            None,
            *norm[:4],
            *(w1, b1, w2, b2),
            training=training,
            momentum=momentum,
            eps=eps,
            gate=gate,
            relu=activation.name == "relu",
        )
    if not torch.jit.is_tracing():
        checks.check_maps(x, None)
        checks.check_gate(x.shape[1], w1, b1, w2, b2, gate)
        checks.check_norm("", x, norm)
        if batch:
            checks.check_batch(x)
    arguments = join.Arguments(
        [x],
        *([bn_weight], [bn_bias], [running_mean], [running_var]),
        *(w1, b1, w2, b2),
        normalizations=[join.BATCH if batch else join.RUNNING],
        eps=[eps],
        activation=activation.name,
        negative_slope=activation.parameter,
        hidden_activation=hidden_activation,
        gate=gate,
    )
    return JOIN.run(resolve_maps(x), arguments, (momentum if training else None,))


def bn_relu_concat_se(
    maps: Sequence[Tensor],
    norms: Sequence[BatchNorm | None],
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    training: Sequence[bool],
    gate: str = "sigmoid",
    activation: str | Activation = "relu",
) -> Tensor:
    """y = s ⊙ concat(relu(BN(x_i))), s the squeeze-and-excitation gate of the concat.

    The sums of the squeeze are taken before the concat is written, which is written once and never
    read. For the backward pass only the maps are kept.

    Args:
        maps: (N,C_i,*spatial) each, with one to three spatial axes; channels_last is the fast
            layout. C = ΣC_i.
        norms: batch norm of each map, a ReLU behind it; None takes a map as it is, without ReLU.
            Running statistics are updated in training, used otherwise.
        w1: (h,C), or (h,C,1,1) as of a 1x1 convolution; None for no gate (s = 1).
        b1: (h,) or None.
        w2: (C,h) or (C,h,1,1); None for no gate.
        b2: (C,) or None.
        training: of each map whether to normalize by the batch's statistics. Without running
            statistics this is done always, as `torch.nn.BatchNorm2d` does.
        gate: as in `squeeze_excite`; not used without w1 and w2.
        activation: in the place of the ReLU, as in `bn_act_se`.

    Returns:
        (N,C,*spatial), dtype that the concatenated maps have.

    Raises:
        UserError: shapes that do not fit, an unknown gate or activation, or an implementation
            chosen with `use` that cannot take the maps.
        ValueError: batch statistics of a single value per channel.
    """
    behind = _activation(activation)
    checks.check_activations(behind, "relu")
    if not torch.jit.is_tracing():
        checks.check_join(maps, norms, training, (w1, b1, w2, b2), gate)
    common = functools.reduce(torch.promote_types, (x.dtype for x in maps))
    maps = [x.to(common) for x in maps]
    given = [norm or _NO_NORM for norm in norms]
    kinds = [
        join.NONE
        if norm is None
        else join.BATCH
        if train or norm.running_mean is None
        else join.RUNNING
        for norm, train in zip(norms, training, strict=True)
    ]
    arguments = join.Arguments(
        maps,
        weights=[norm.weight for norm in given],
        biases=[norm.bias for norm in given],
        means=[norm.running_mean for norm in given],
        variances=[norm.running_var for norm in given],
        w1=w1,
        b1=b1,
        w2=w2,
        b2=b2,
        normalizations=kinds,
        eps=[norm.eps for norm in given],
        gate=gate,
        activation=behind.name,
        negative_slope=behind.parameter,
    )
    momenta = [
        norm.momentum if train else None for norm, train in zip(given, training, strict=True)
    ]
    return JOIN.run(resolve_maps(*maps), arguments, momenta)


def depthwise(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """A depthwise convolution without bias: `F.conv2d(x, weight, stride=…, groups=C)`.

    The C++ kernels take float32 maps in channels_last with kernels of 3, 5 or 7; everything else
    runs in PyTorch's own convolution.

    Args:
        x: (N,C,H,W).
        weight: (C,1,k,k).
        stride: in both directions.
        padding: zeros on each side.

    Returns:
        (N,C,OH,OW), dtype of x; channels_last for such an x.

    Raises:
        UserError: shapes that do not fit, or an implementation chosen with `use` that cannot take
            x.
    """
    if not torch.jit.is_tracing():
        checks.check_depthwise(x, weight, stride, padding)
    suits = (
        weight.shape[-1] in KERNELS
        and x.dtype == weight.dtype == torch.float32
        and memory_format(x) is torch.channels_last
        and not torch.is_autocast_enabled(x.device.type)
    )
    implementation = resolve(x)
    if implementation in ("cpu", "triton") and not (suits and implementation == "cpu"):
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])
    return DEPTHWISE.run(
        implementation, depthwise_convolution.Arguments(x, weight, stride, padding), ()
    )
