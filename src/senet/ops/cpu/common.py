"""What the C++ kernels share: the library's loader, what it takes, tensors as addresses."""

from __future__ import annotations

import ctypes
import os
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

from senet.errors import UserError
from senet.ops.maps import accumulator
from senet.ops.reference import GATES

ISAS = ("avx512", "avx2", "baseline")
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
ACCUMULATORS = {dtype: accumulator(dtype) for dtype in STORAGE}
GATE_NUMBERS = {name: index for index, name in enumerate(GATES)}


# TailArguments of cpu_types.h: sizes and options, two NormArguments, addresses. Packed in one call,
# because on small maps the time of the arguments is that of the kernel.
TAIL_BLOCK = struct.Struct("=10q 4q2d 4q2d 11q 11q")
# JoinArguments and JoinBranch
JOIN_BLOCK = struct.Struct("=8q 4q 5q 5q")
JOIN_BRANCH = struct.Struct("=2q 4q2d 4q")


def _loaded_openmp() -> str | None:
    """Path of the OpenMP runtime that PyTorch has loaded into this process."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        pattern = re.compile(r"\S*/lib(?:gomp|iomp5|omp)[^/]*\.so\S*$")
        for line in maps.read_text().splitlines():
            if found := pattern.search(line):
                return found.group()
    beside = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    return str(beside[0]) if beside else None


def _load(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The kernels' library in `folder` and an empty text, or None and why there is none."""
    remedy = (
        "install a C++17 compiler with OpenMP (Debian, Ubuntu: apt install g++) and reinstall with "
        "`pip install --force-reinstall --no-deps senet` (in a checkout: `pip install -e .`)"
    )
    found = sorted(folder.glob("_cpu*.so"))
    if not found:
        return None, f"the C++ kernels were not built; {remedy}"
    openmp = _loaded_openmp()
    if openmp is None:
        return None, "PyTorch has loaded no OpenMP runtime; install a PyTorch built with OpenMP"
    try:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"{found[0].name} does not load ({error}); {remedy}"
    library.senet_arguments_size.restype = ctypes.c_int64
    library.senet_isa.restype = ctypes.c_char_p
    if library.senet_arguments_size() != TAIL_BLOCK.size + JOIN_BLOCK.size + JOIN_BRANCH.size:
        return None, f"{found[0].name} is of another version of senet; {remedy}"
    for name in ("tail_forward", "tail_backward", "join_forward", "join_backward"):
        getattr(library, f"senet_{name}").argtypes = (ctypes.c_int, ctypes.c_char_p)
    wanted = os.environ.get("SENET_ISA", "")
    if wanted and wanted not in ISAS:
        raise UserError(f"SENET_ISA is {wanted!r}; set it to one of {', '.join(ISAS)}, or unset it")
    return library, ""


_LIBRARY, MISSING = _load(Path(__file__).parent.parent)


def instruction_set() -> str:
    """What the kernels use on this processor: avx512, avx2 or baseline ("" if not built)."""
    return "" if _LIBRARY is None else str(_LIBRARY.senet_isa().decode())


def unsupported(x: Tensor) -> str:
    """Why the kernels cannot take x; empty if they can."""
    if _LIBRARY is None:
        return MISSING
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
    if getattr(_LIBRARY, f"senet_{name}")(STORAGE[x.dtype], arguments):
        raise MemoryError("no memory for the partial sums of senet's kernels")
