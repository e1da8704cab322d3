"""The depthwise convolution in C++: `forward` and `backward`, for non-empty maps on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from senet import kernels
from senet.kernels.structs import DepthwiseArguments, packer
from senet.ops.algebra import depthwise as algebra
from senet.ops.cpu import common
from senet.ops.depthwise_convolution import (
    Arguments,
    Gradients,
    Outputs,
    Saved,
    empty_gradients,
    empty_outputs,
)
from senet.ops.description import Momenta

KERNELS = (3, 5, 7)
_BLOCK = packer(DepthwiseArguments)


def takes(x: Tensor) -> bool:
    """Whether the dispatcher hands x to the kernels."""
    return x.dtype is torch.float32 and common.takes(x)


def _suits(weight: Tensor, stride: int) -> bool:
    return weight.dtype is torch.float32 and weight.shape[-1] in KERNELS and stride >= 1


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _run(name: str, a: Arguments | Saved, y: Tensor, *addresses: int) -> None:
    N, C, H, W = a.x.shape
    sizes = (N, C, H, W, y.shape[2], y.shape[3], a.weight.shape[-1], a.stride, a.padding)
    weight = a.weight.contiguous()
    threads = torch.get_num_threads()
    block = _BLOCK.pack(*sizes, threads, a.x.data_ptr(), weight.data_ptr(), *addresses)
    if getattr(kernels.LIBRARY, f"senet_depthwise_{name}")(block):
        raise MemoryError("no memory for the partial sums of senet's kernels")


def forward(a: Arguments, _: Momenta | None) -> Outputs:
    """y and what `backward` needs."""
    if not _suits(a.weight, a.stride):
        return algebra.forward(a)
    outputs = empty_outputs(a)
    _run("forward", a._replace(x=_last(a.x)), outputs.y, *(t.data_ptr() for t in outputs), 0, 0, 0)
    return outputs


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, from that of y."""
    if not _suits(saved.weight, saved.stride):
        return algebra.backward(gradient, saved, wanted)
    found = empty_gradients(saved, wanted)
    packed = saved.packed.contiguous()
    g = _last(gradient.to(torch.float32))
    addresses = (0 if t is None else t.data_ptr() for t in found)
    _run(
        "backward",
        saved._replace(x=_last(saved.x)),
        g,
        0,
        *(t.data_ptr() for t in (packed, g)),
        *addresses,
    )
    return found
