"""PyTorch's own convolution, of any device and type: `forward` and `backward`."""

from __future__ import annotations

import torch
from torch import Tensor

from senet.ops.convolution.description import Arguments, Gradients, Outputs, Saved, output_format
from senet.ops.maps import memory_format, stored


def forward(a: Arguments) -> Outputs:
    """y, in the format that the description promises."""
    y = torch.conv2d(a.x, a.weight, None, a.stride, a.padding, groups=a.groups)
    return Outputs(stored(y, a.x.dtype, output_format(a.x, a.weight)))


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, each in the format of what it belongs to."""
    x, weight, stride, padding, groups = saved
    mask = [wanted.x, wanted.weight, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, [1, 1], False, [0, 0], groups, mask
    )
    return Gradients(
        dx.contiguous(memory_format=memory_format(x)) if wanted.x else None,
        dweight.contiguous(memory_format=memory_format(weight)) if wanted.weight else None,
    )
