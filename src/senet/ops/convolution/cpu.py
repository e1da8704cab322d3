"""The convolution in C++ where the rule says so, and in PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from senet import kernels
from senet.kernels.structs import ConvolutionArguments, packer
from senet.ops.convolution import pytorch
from senet.ops.convolution.description import (
    Arguments,
    Gradients,
    Outputs,
    Saved,
    empty_like,
    output_size,
)
from senet.ops.convolution.rule import Passes, packed, passes
from senet.ops.description import Momenta

_BLOCK = packer(ConvolutionArguments)


def takes(x: Tensor) -> bool:
    """Whether the dispatcher hands x to this module."""
    return (
        kernels.LIBRARY is not None
        and x.device.type == "cpu"
        and x.dtype is torch.float32
        and x.numel() > 0
    )


def _passes(a: Arguments | Saved) -> Passes:
    """What the kernels compute: nothing of maps in another order than channels_last."""
    x, weight = a.x, a.weight
    if weight.dtype is not x.dtype or not x.is_contiguous(memory_format=torch.channels_last):
        return Passes()
    sizes = tuple(x.shape), tuple(weight.shape), tuple(a.stride), tuple(a.padding)
    return passes(*sizes, a.groups)


def forward(a: Arguments, _: Momenta | None) -> Outputs:
    """y."""
    if not _passes(a).forward:
        return pytorch.forward(a)
    size = output_size(a.x.shape, a.weight.shape, a.stride, a.padding)
    y = torch.empty(size, memory_format=torch.channels_last)
    _call("forward", a, a.x, _dense(a), y)
    return Outputs(y)


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, from that of y."""
    able = _passes(saved)
    ours = Gradients(wanted.x and able.x, wanted.weight and able.weight)
    x = weight = None
    if any(ours):
        # What a sum or a mean sends back has a value for all positions, and strides of 0.
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    if ours.x:
        x = torch.empty_like(saved.x, memory_format=torch.channels_last)
        _call("input_gradient", saved, x, _dense(saved), gradient)
    if ours.weight:
        dense = torch.empty(_dense_shape(saved), memory_format=torch.channels_last)
        _call("weights_gradient", saved, saved.x, dense, gradient)
        weight = dense
        if dense.shape != saved.weight.shape or dense.stride() != saved.weight.stride():
            weight = empty_like(saved.weight)
            _blocks(weight, saved).copy_(_diagonal(dense, saved))
    rest = Gradients(wanted.x and not ours.x, wanted.weight and not ours.weight)
    if any(rest):
        others = pytorch.backward(gradient, saved, rest)
        x, weight = x if ours.x else others.x, weight if ours.weight else others.weight
    return Gradients(x, weight)


def _dense_shape(a: Arguments | Saved) -> tuple[int, int, int, int]:
    """Of the weights that the kernels take: several small groups are one, with zeros between."""
    K, C, height, width = a.weight.shape
    return K, C * packed(a.weight.shape, a.groups), height, width


def _dense(a: Arguments | Saved) -> Tensor:
    """The weights so."""
    shape = _dense_shape(a)
    if shape == a.weight.shape:
        return a.weight
    dense = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    _diagonal(dense, a).copy_(_blocks(a.weight, a))
    return dense


def _blocks(weight: Tensor, a: Arguments | Saved) -> Tensor:
    """(which, of those that run as one, outputs, inputs, h, w) of weights (K,any,h,w)."""
    together = packed(a.weight.shape, a.groups)
    return weight.unflatten(0, (a.groups // together, together, -1))


def _diagonal(dense: Tensor, a: Arguments | Saved) -> Tensor:
    """The same of the weights that the kernels take."""
    parts = _blocks(dense, a).unflatten(3, (-1, a.weight.shape[1]))
    return parts.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _call(name: str, a: Arguments | Saved, x: Tensor, weight: Tensor, y: Tensor) -> None:
    N, C, H, W = x.shape
    weight = weight.contiguous(memory_format=torch.channels_last)
    groups = C // weight.shape[1]
    block = _BLOCK.pack(
        *(N, H, W, C, y.shape[2], y.shape[3], y.shape[1], *a.padding),
        *(weight.shape[2], a.stride[0], groups, torch.get_num_threads()),
        *(x.data_ptr(), weight.data_ptr(), y.data_ptr()),
    )
    if getattr(kernels.LIBRARY, f"senet_convolution_{name}")(block):
        raise MemoryError("no memory for the sums of senet's convolution kernels")
