"""All C++ of the package: one library with the kernels of the operator and of `senet.optimize`.

Compiled for several instruction sets; dispatch.cpp takes the best that the processor has, or the
one that the environment's SENET_ISA names (`ISAS`). This module alone finds, loads and checks the
library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch

from senet.errors import UserError
from senet.kernels.structs import differing_field

# Best first, of this machine's processors; the last one is there for all of them (dispatch.cpp).
ISAS = ("neon",) if platform.machine() in ("aarch64", "arm64") else ("avx512", "avx2", "baseline")
_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
_NAME = f"libsenet{_SUFFIXES.get(sys.platform, '.so')}"
_REMEDY = (
    "install a C++17 compiler (Debian, Ubuntu: apt install g++) and reinstall with "
    "`pip install --force-reinstall --no-deps senet` (in a checkout: `pip install -e .`)"
)


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


def load(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The kernels' library in `folder` and an empty text, or None and why there is none.

    Raises:
        UserError: SENET_ISA names no instruction set.
    """
    wanted = os.environ.get("SENET_ISA", "")
    if wanted and wanted not in ISAS:
        raise UserError(f"SENET_ISA is {wanted!r}; set it to one of {', '.join(ISAS)}, or unset it")
    path = folder / _NAME
    if not path.exists():
        return None, f"the C++ kernels were not built; {_REMEDY}"
    openmp = _loaded_openmp()
    if openmp is None:
        return None, "PyTorch has loaded no OpenMP runtime; install a PyTorch built with OpenMP"
    try:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{_NAME} does not load ({error}); {_REMEDY}"
    if difference := differing_field(library):
        return None, f"{_NAME} is of another version of senet: {difference}; {_REMEDY}"
    for name in ("tail_forward", "tail_backward", "join_forward", "join_backward"):
        getattr(library, f"senet_{name}").argtypes = (ctypes.c_int, ctypes.c_char_p)
    for name in ("depthwise_forward", "depthwise_backward"):
        getattr(library, f"senet_{name}").argtypes = (ctypes.c_char_p,)
    for name in ("forward", "input_gradient", "weights_gradient"):
        getattr(library, f"senet_convolution_{name}").argtypes = (ctypes.c_char_p,)
    for name in ("panel", "tile_rows", "step_floats"):
        getattr(library, f"senet_{name}").restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.senet_run.argtypes = (pointer, number, number, pointer, number)
    library.senet_run.restype = None
    library.senet_isa.restype = ctypes.c_char_p
    return library, ""


LIBRARY, MISSING = load(Path(__file__).parent)


def instruction_set() -> str:
    """What the kernels use on this processor: one of `ISAS` ("" if not built)."""
    return "" if LIBRARY is None else str(LIBRARY.senet_isa().decode())
