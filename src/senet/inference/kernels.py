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
# Bytes of a huge page. A panel of weights spans many small ones.
_HUGE = 2 << 20


def run(steps: ctypes.Array[Step], threads: int, scratch: Tensor) -> None:
    """Run the steps one after the other; each thread has an equal share of the scratch memory."""
    assert LIBRARY is not None
    share = scratch.numel() // threads
    LIBRARY.senet_run(steps, len(steps), threads, scratch.data_ptr(), share)


def allocate(count: int) -> Tensor:
    """Zeros, float32, (count + slack,): on huge pages where they fill one."""
    size = 4 * (count + SLACK)
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count + SLACK)
    # Shared memory, which is Python's default, would be that of forked processes too, whose runs
    # would write into each other's maps; and it gets no huge pages.
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    before = -torch.frombuffer(memory, dtype=torch.float32).data_ptr() % _HUGE
    return torch.frombuffer(memory, dtype=torch.float32, count=count + SLACK, offset=before)
