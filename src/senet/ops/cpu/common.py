"""What the operators in C++ share: what the kernels take, tensors as addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from senet import kernels
from senet.kernels.structs import (
    Elementwise,
    Gate,
    JoinArguments,
    JoinBranch,
    TailArguments,
    packer,
)
from senet.ops.maps import accumulator
from senet.ops.reference import BRANCH_ACTIVATIONS, GATES

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
ACCUMULATORS = {dtype: accumulator(dtype) for dtype in STORAGE}
GATE_NUMBERS = {name: int(Gate[name.upper()]) for name in GATES}
ACTIVATION_NUMBERS = {name: int(Elementwise[name.upper()]) for name in BRANCH_ACTIVATIONS}

# Each packed in one call, because on small maps the time of the arguments is that of the kernel.
TAIL_BLOCK = packer(TailArguments)
JOIN_BLOCK = packer(JoinArguments)
JOIN_BRANCH = packer(JoinBranch)


def unsupported(x: Tensor) -> str:
    """Why the kernels cannot take x; empty if they can."""
    if kernels.LIBRARY is None:
        return kernels.MISSING
    if x.device.type != "cpu":
        return f"the C++ kernels run on the CPU, the input is on {x.device}"
    if x.dtype not in STORAGE:
        return f"the C++ kernels take float32, bfloat16 and float64, the input is {x.dtype}"
    return ""


def takes(x: Tensor) -> bool:
    """Whether the dispatcher hands x to the kernels."""
    return x.numel() > 0 and not unsupported(x)


def numbers(t: Tensor | None, dtype: torch.dtype, kept: list[Tensor]) -> int:
    """Address of t as contiguous numbers of the accumulation type; a copy is put into `kept`."""
    if t is None:
        return 0
    if t.dtype is not dtype or not t.is_contiguous():
        t = t.to(dtype).contiguous()
        kept.append(t)
    return t.data_ptr()


def call(name: str, x: Tensor, arguments: bytes) -> None:
    """Run a kernel of the library for maps of the dtype of x."""
    if getattr(kernels.LIBRARY, f"senet_{name}")(STORAGE[x.dtype], arguments):
        raise MemoryError("no memory for the partial sums of senet's kernels")
