"""Programs of steps for the C++ kernels: memory for them, and the call that runs them."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from senet.kernels import LIBRARY
from senet.kernels.structs import Step

# Output channels of a panel of packed weights, and rows of a register tile.
PANEL = 0 if LIBRARY is None else int(LIBRARY.senet_panel())
TILE_ROWS = 0 if LIBRARY is None else int(LIBRARY.senet_tile_rows())
# Scratch floats that each step needs of a thread's.
STEP_FLOATS = 0 if LIBRARY is None else int(LIBRARY.senet_step_floats())
STRIDES = frozenset(name for name, *_ in Step._fields_ if name.endswith("_ld"))
# A vector may be read behind the last channel of the last pixel.
SLACK = 64
# Memory from here on gets huge pages: a panel of weights spans many small ones.
_HUGE = 1 << 20


def run(steps: ctypes.Array[Step], threads: int, scratch: Tensor) -> None:
    """Run the steps one after the other; each thread has an equal share of the scratch memory."""
    assert LIBRARY is not None
    share = scratch.numel() // threads
    LIBRARY.senet_run(steps, len(steps), threads, scratch.data_ptr(), share)


def allocate(count: int) -> Tensor:
    """Zeros, float32, (count + slack,): on huge pages where there are many."""
    size = 4 * (count + SLACK)
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count + SLACK)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)
