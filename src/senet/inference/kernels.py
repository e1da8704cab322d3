"""The library of kernels.cpp: its steps as ctypes structures, and its loader."""

from __future__ import annotations

import ctypes
import mmap
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from senet.ops.cpu import common as cpu


class Kind(IntEnum):
    """What a step does; the order of `Kind` in kernels.cpp."""

    INPUT = 0
    CONVOLUTION = 1
    WINOGRAD = 2
    WINOGRAD_INPUT = 3
    WINOGRAD_PRODUCT = 4
    DEPTHWISE = 5
    MAX_POOL = 6
    AVERAGE_POOL = 7
    SUMS = 8
    MEANS = 9
    POINTWISE = 10
    EXCITATION = 11
    IMAGES = 12
    GROUPED = 13


# Activations of a step: none, ReLU, and from here on the gates of senet.ops in their order.
LINEAR, RELU, FIRST_GATE = 0, 1, 2
POINTERS = ("x", "weights", "bias", "gates", "shortcut", "y", "shared", "sums")
SIZES = (
    *("x_ld", "y_ld", "gates_ld", "shortcut_ld", "sums_ld"),
    *("N", "H", "W", "C", "OH", "OW", "OC"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w"),
    *("dilation_h", "dilation_w", "groups", "activation", "rows", "panels", "tile"),
)


class Step(ctypes.Structure):
    """One step of a program, `Step` of kernels.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("done", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("strides", ctypes.c_int64 * 4),
    )


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and an empty text, or None and the reason why there is none."""
    if cpu.MISSING:
        return None, cpu.MISSING  # the same compiler, and the same OpenMP runtime
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return None, "the inference kernels were not built; reinstall senet with a C++17 compiler"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"{found[0].name} does not load ({error}); reinstall senet"
    for name in ("panel", "tile_rows", "step_size"):
        getattr(library, f"senet_inference_{name}").restype = ctypes.c_int64
    library.senet_inference_isa.restype = ctypes.c_char_p
    if library.senet_inference_step_size() != ctypes.sizeof(Step):
        return None, f"{found[0].name} is of another version of senet; reinstall senet"
    library.senet_inference_run.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    )
    library.senet_inference_run.restype = None
    return library, ""


_LIBRARY, MISSING = _load()
# Output channels of a panel of packed weights, and rows of a register tile.
PANEL = 0 if _LIBRARY is None else int(_LIBRARY.senet_inference_panel())
TILE_ROWS = 0 if _LIBRARY is None else int(_LIBRARY.senet_inference_tile_rows())
# A vector may be read behind the last channel of the last pixel.
SLACK = 64
# Memory from here on gets huge pages: a panel of weights spans many small ones.
_HUGE = 1 << 20


def instruction_set() -> str:
    """The one in use: avx512, avx2 or baseline; "" where the kernels are missing."""
    return "" if _LIBRARY is None else str(_LIBRARY.senet_inference_isa().decode())


def run(steps: ctypes.Array[Step], threads: int, scratch: Tensor) -> None:
    """Run the steps one after the other; each thread has an equal share of the scratch memory."""
    assert _LIBRARY is not None
    share = scratch.numel() // threads
    _LIBRARY.senet_inference_run(steps, len(steps), threads, scratch.data_ptr(), share)


def allocate(count: int) -> Tensor:
    """Zeros, float32, (count + slack,): on huge pages where there are many."""
    size = 4 * (count + SLACK)
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count + SLACK)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)
