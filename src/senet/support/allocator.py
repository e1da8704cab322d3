"""Keep freed memory in the process: a fifth of a CPU network's time is page faults otherwise.

PyTorch returns large CPU tensors to the system at each free, and the next map of the same size is
zeroed and faulted in again page by page. glibc can be told to keep them.
"""

import ctypes
import platform
from dataclasses import dataclass

# malloc.h: the names of mallopt's parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

# mallopt takes a C int. 1 GiB is beyond every map of a training step that fits this mechanism;
# larger ones are mapped anew, as before.
_MAPPED_FROM = 1 << 30
_KEPT = (1 << 31) - 1
_GROWN_BY = 1 << 28


@dataclass(frozen=True)
class Tuning:
    """Whether the allocator was tuned.

    Attributes:
        applied: True if freed memory now stays in the process.
        reason: why not; empty if applied.
    """

    applied: bool
    reason: str


def tune_allocator() -> Tuning:
    """Tell glibc's malloc to keep freed maps for the next ones, for the rest of the process.

    Blocks below 1 GiB come from the heap instead of mappings of their own, and the heap is trimmed
    only when 2 GiB lie free at its end. The process keeps its peak memory until it ends. `senet
    train`, `compare`, `evaluate` and `predict` call this at their start; importing `senet` does
    not. Equivalent to starting with MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and
    MALLOC_TOP_PAD_ in the environment.

    Returns:
        Whether it was applied; elsewhere than on Linux with glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return Tuning(False, f"only glibc's allocator is tuned, not {platform.system()}'s")
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = (
        (_M_MMAP_THRESHOLD, _MAPPED_FROM),
        (_M_TRIM_THRESHOLD, _KEPT),
        (_M_TOP_PAD, _GROWN_BY),
    )
    refused = [name for name, value in settings if mallopt(name, value) != 1]
    if refused:
        return Tuning(False, f"glibc refused mallopt parameters {refused}")
    return Tuning(True, "")
