"""The convolution layers of our networks, which stay plain `nn.Conv2d`."""

import torch
from torch import Tensor, nn

from senet.nn.block import hooked, leaves_process
from senet.ops.choice import transforms
from senet.ops.convolution import convolve as operator
from senet.ops.convolution import passes


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), through `senet.ops.convolution` where its kernels are the faster ones.

    The layer itself is called for everything but a plain `nn.Conv2d` without bias and dilation,
    hooks included, whose input is a float32 map in channels_last on the CPU; and wherever
    somebody looks at single operations: torch.compile, export, a trace, autocast, torch.func,
    dispatch and function modes.

    Args:
        layer: any module that takes x.
        x: its input.

    Returns:
        The layer's output.
    """
    found = by_kernels(layer, x)
    return layer(x) if found is None else found


def by_kernels(layer: nn.Module, x: Tensor) -> Tensor | None:
    """layer(x) through `senet.ops.convolution`; None where the layer itself has to compute it."""
    if type(layer) is nn.Conv2d and not torch.compiler.is_compiling() and _worthwhile(layer, x):
        assert isinstance(layer.padding, tuple)
        return operator(
            x, layer.weight, stride=layer.stride, padding=layer.padding, groups=layer.groups
        )
    return None


def _worthwhile(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether a kernel would run, in this pass or in the backward one."""
    if not plain(layer, x):
        return False
    assert isinstance(layer.padding, tuple)
    sizes = tuple(x.shape), tuple(layer.weight.shape), layer.stride, layer.padding
    found = passes(*sizes, layer.groups)
    if found.forward:
        return True
    if not torch.is_grad_enabled():
        return False
    return (x.requires_grad and found.x) or (layer.weight.requires_grad and found.weight)


def plain(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether layer(x) is a convolution of a float32 map in channels_last on the CPU, unwatched."""
    weight = layer.weight
    return not (
        leaves_process(x)
        or transforms()
        or type(x) is not Tensor
        or type(weight) is not nn.Parameter
        or x.ndim != 4
        or x.shape[1] != weight.shape[1] * layer.groups
        or x.dtype is not torch.float32
        or weight.dtype is not torch.float32
        or x.device.type != "cpu"
        or weight.device.type != "cpu"
        or layer.bias is not None
        or layer.dilation != (1, 1)
        or layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
        or not x.is_contiguous(memory_format=torch.channels_last)
        or hooked(layer)
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )
