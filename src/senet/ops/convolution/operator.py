"""The operator, and the function that calls it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from senet.errors import UserError
from senet.ops.choice import resolve
from senet.ops.convolution import cpu, pytorch
from senet.ops.convolution.description import CONVOLUTION, Arguments
from senet.ops.description import Kernels, Momenta, Operator
from senet.ops.maps import autocast_is_on


def _reference(a: Arguments, _: Momenta) -> Tensor:
    return torch.conv2d(a.x, a.weight, None, a.stride, a.padding, groups=a.groups)


OPERATOR = Operator(
    CONVOLUTION,
    reference=_reference,
    algebra=pytorch,
    kernels={"cpu": Kernels(cpu.takes, cpu)},
)


def _pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < least:
        raise UserError(f"{name} is {value!r}; give one or two integers of at least {least}")
    return pair


def convolve(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d(x, weight, None, stride, padding, 1, groups)`, forward and backward.

    float32 maps in channels_last on the CPU go through senet's kernels for the passes in which
    these are faster (`senet.ops.convolution.use`); everything else is PyTorch's own convolution,
    also under autocast. 3x3 kernels with stride 1 are computed by Winograd's F(4x4, 3x3) (Lavin
    and Gray, arXiv 1509.09308), whose rounding errors are about twice those of a plain float32
    sum. The same input gives the same bits, whatever the number of threads.

    Args:
        x: (N,C,H,W), any floating type and device.
        weight: (K,C/groups,h,w), dtype of x.
        stride: one for both axes, or two.
        padding: zeros at each side, one number for both axes, or two.
        groups: of channels, a divisor of C and K.

    Returns:
        (N,K,OH,OW), channels_last where x or the weight is.

    Raises:
        UserError: shapes that do not fit, or a stride, padding or groups out of range.
    """
    strides, zeros = _pair("stride", stride, 1), _pair("padding", padding, 0)
    if groups < 1:
        raise UserError(f"groups is {groups}; give an integer of at least 1")
    fits = x.ndim == weight.ndim == 4 and x.shape[1] == weight.shape[1] * groups
    if not fits or weight.shape[0] % groups:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; in {groups} groups "
            "they must be (N,C,H,W) and (K,C/groups,h,w), with K a multiple of the groups"
        )
    if autocast_is_on(x.device.type):
        return torch.conv2d(x, weight, None, strides, zeros, groups=groups)
    implementation = resolve(x)
    if implementation == "cpu" and x.dtype is not torch.float32:
        implementation = "algebra"
    return OPERATOR.run(implementation, Arguments(x, weight, strides, zeros, groups), ())
