"""The depthwise convolution by PyTorch's own, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from senet.ops.depthwise_convolution import Arguments, Gradients, Outputs, Saved, arguments_of
from senet.ops.maps import stored


def forward(a: Arguments) -> Outputs:
    """y and what its backward pass needs."""
    y = F.conv2d(a.x, a.weight, None, a.stride, a.padding, 1, a.x.shape[1])
    packed = a.weight.flatten(1).t().contiguous()
    return Outputs(stored(y, a.x.dtype, torch.channels_last), packed)


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, from that of y."""
    x, weight, stride, padding = arguments_of(saved)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        *(gradient, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0]),
        *(x.shape[1], [wanted.x, wanted.weight, False]),
    )
    last, plain = torch.channels_last, torch.contiguous_format
    return Gradients(
        None if dx is None else dx.contiguous(memory_format=last),
        None if dweight is None else dweight.contiguous(memory_format=plain),
    )
