"""Launching Triton kernels without looking each one up anew.

`kernel[grid](…)` binds and specializes every argument in Python before it finds what it compiled,
which takes several times as long as a small kernel runs. A call with the same types, alignments and
numbers as a former one needs the same binary: here it is found by these.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# Before 3.3 a binary did not take its compile-time constants as arguments.
_KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_MOST = 4096  # binaries that are kept at hand; beyond it all are looked up anew
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    device: torch.device, kernel: Any, programs: int, *arguments: Any, **constants: Any
) -> None:
    """Launch so many programs of a kernel on the current device.

    Args:
        device: the current device; other than CUDA and ROCm for Triton's interpreter.
        kernel: a `triton.jit` function.
        programs: the grid's only dimension.
        arguments: the kernel's first arguments; tensors, numbers, None.
        constants: its other ones by name.
    """
    if device.type != "cuda" or not _KNOWN:
        kernel[(programs,)](*arguments, **constants)
        return
    key = (id(kernel), device.index, *map(_decisive, arguments), *constants.values())
    binary = _compiled.get(key)
    if binary is None:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = kernel[(programs,)](*arguments, **constants)
        return
    rest = kernel.arg_names[len(arguments) :]
    binary[programs, 1, 1](*arguments, *[constants[name] for name in rest])


def _decisive(argument: Any) -> object:
    """What of an argument Triton compiles for, or more."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return float if isinstance(argument, float) else argument
