"""What stands in the place of a tail's modules: one call of the operator with their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet import ops
from senet.nn.convolution import by_kernels
from senet.nn.tails import own_statistics, step_norm
from senet.ops import Activation
from senet.ops.checks import GateParameters


def _parameters(fc1: Any, fc2: Any) -> GateParameters:
    """w1, b1, w2, b2 of a gate's layers."""
    if fc1 is None or fc2 is None:
        return None, None, None, None
    return fc1.weight, fc1.bias, fc2.weight, fc2.bias


def normalized(
    x: Tensor,
    norm: _BatchNorm,
    fc1: nn.Module | None,
    fc2: nn.Module | None,
    hidden_activation: str,
    gate: str,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """SE(act(norm(x))) by `senet.ops.bn_act_se`; without layers act(norm(x))."""
    if x.ndim < 3 and fc1 is None:  # no map, which batch norms for sequences take too
        return Activation(activation, negative_slope)(type(norm).forward(norm, x))
    own = own_statistics(norm)
    x, given = step_norm(norm, x)
    return ops.bn_act_se(
        x,
        *given[:4],
        *_parameters(fc1, fc2),
        training=own,
        momentum=given.momentum,
        eps=given.eps,
        activation=Activation(activation, negative_slope),
        hidden_activation=hidden_activation,
        gate=gate,
    )


def added(
    x: Tensor,
    shortcut: Tensor,
    norm: _BatchNorm,
    shortcut_norm: _BatchNorm | None,
    fc1: nn.Module | None,
    fc2: nn.Module | None,
    gate: str,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """act(SE(norm(x)) + shortcut_norm(shortcut)) by `senet.ops.bn_se_add_relu`."""
    act = Activation(activation, negative_slope)
    if getattr(shortcut, "shape", None) != x.shape or x.ndim < 3:  # broadcast, a number, no map
        y = normalized(x, norm, fc1, fc2, "relu", gate, "linear", 0.0)
        y = y + (shortcut if shortcut_norm is None else shortcut_norm(shortcut))
        return act(y)
    own, other = own_statistics(norm), None
    if shortcut_norm is not None:
        if own == own_statistics(shortcut_norm):
            shortcut, other = step_norm(shortcut_norm, shortcut)
        else:  # one of them is frozen
            shortcut = shortcut_norm(shortcut)
    x, given = step_norm(norm, x)
    return ops.bn_se_add_relu(
        x,
        shortcut,
        *given[:4],
        *_parameters(fc1, fc2),
        training=own,
        momentum=given.momentum,
        eps=given.eps,
        gate=gate,
        relu=activation != "linear",
        activation=act if activation != "linear" else "relu",
        shortcut_norm=other,
    )


def convolution(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), by `senet.ops.convolution` where its kernels are the faster ones."""
    found = by_kernels(conv, x)
    return type(conv).forward(conv, x) if found is None else found


def reading(
    compute: Callable[[nn.Module, Tensor], Tensor],
) -> Callable[[nn.Module, Tensor], Tensor]:
    """The same, and x is not kept for the backward pass where the operator made it."""

    def function(conv: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return compute(conv, x)
        with ops.recomputed(x):
            return compute(conv, x)

    return function


def depthwise(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x) by `senet.ops.depthwise`."""
    assert isinstance(conv, nn.Conv2d)
    if x.ndim != 4 or conv._parameters["bias"] is not None:
        return type(conv).forward(conv, x)
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return ops.depthwise(x, conv.weight, conv.stride[0], padding)


def excited(x: Tensor, fc1: nn.Module, fc2: nn.Module, hidden_activation: str, gate: str) -> Tensor:
    """SE(x) by `senet.ops.squeeze_excite`."""
    w1, b1, w2, b2 = _parameters(fc1, fc2)
    assert w1 is not None
    assert w2 is not None
    return ops.squeeze_excite(x, w1, b1, w2, b2, gate, hidden_activation=hidden_activation)
