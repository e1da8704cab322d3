"""The C++ kernels of cpu.cpp behind the signatures of `senet.ops.algebra`, and their loader."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from senet.errors import UserError
from senet.ops.algebra import (
    GRADIENTS,
    TailOutput,
    dense,
    empty_gradients,
    empty_outputs,
    statistics_rows,
)
from senet.ops.reference import GATES, accumulator

ISAS = ("avx512", "avx2", "baseline")
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_NORMALIZATIONS = ("none", "running", "batch")


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "running_mean", "running_var")),
        ("eps", ctypes.c_double),
    )


_SIZES = ("N", "C", "P", "H", "channels_last", "threads", "gate", "relu", "normalization", "kind")
_POINTERS = (
    "x",
    "shortcut",
    "w1",
    "b1",
    "w2",
    "b2",
    "y",
    "statistics",
    "squeezed",
    "hidden",
    "gates",
)
_BACKWARD = ("gradient", *(f"d{name}" for name in GRADIENTS))


class _Arguments(ctypes.Structure):
    """TailArguments of cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("norm", _Norm),
        ("shortcut_norm", _Norm),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_BACKWARD)),
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
    if library.senet_arguments_size() != ctypes.sizeof(_Arguments):
        return None, f"{found[0].name} is of another version of senet; {remedy}"
    for function in (library.senet_tail_forward, library.senet_tail_backward):
        function.argtypes = (ctypes.c_int, ctypes.POINTER(_Arguments))
    wanted = os.environ.get("SENET_ISA", "")
    if wanted and wanted not in ISAS:
        raise UserError(f"SENET_ISA is {wanted!r}; set it to one of {', '.join(ISAS)}, or unset it")
    return library, ""


_LIBRARY, MISSING = _load(Path(__file__).parent)


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


class _Call:
    """Fills the argument block; keeps every tensor whose address is in it alive."""

    def __init__(self, x: Tensor, hidden: int, gate: str, relu: bool, normalization: str) -> None:
        self.x = dense(x)
        self.dtype = accumulator(x.dtype)
        self.kept: list[Tensor] = [self.x]
        self.block = _Arguments()
        block = self.block
        N, C = x.shape[0], x.shape[1]
        block.N, block.C, block.H = N, C, hidden
        block.P = x.numel() // (N * C)
        block.channels_last = block.P == 1 or not self.x.is_contiguous()
        block.threads = torch.get_num_threads()
        block.gate = GATES.index(gate)
        block.relu = relu
        block.normalization = _NORMALIZATIONS.index(normalization)
        block.x = self.x.data_ptr()

    def like_x(self, t: Tensor | None) -> int | None:
        """Address of t with the dtype and memory order of x."""
        if t is None:
            return None
        if t.dtype != self.x.dtype or t.stride() != self.x.stride():
            t = torch.empty_like(self.x).copy_(t)
        self.kept.append(t)
        return t.data_ptr()

    def parameter(self, t: Tensor | None) -> int | None:
        """Address of t as contiguous numbers of the accumulation type."""
        if t is None:
            return None
        if t.dtype != self.dtype or not t.is_contiguous():
            t = t.to(self.dtype).contiguous()
        self.kept.append(t)
        return t.data_ptr()

    def norm(self, *parameters: Tensor | None, eps: float) -> _Norm:
        return _Norm(*map(self.parameter, parameters), eps)

    def run(self, function: object) -> None:
        assert callable(function)
        if function(STORAGE[self.x.dtype], self.block):
            raise MemoryError("no memory for the partial sums of senet's kernels")


def tail(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_var: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    normalization: str,
    normalize_shortcut: bool,
    eps: float,
    shortcut_eps: float,
    gate: str,
    relu: bool,
) -> TailOutput:
    """`senet.ops.algebra.tail` in C++, for a non-empty x on the CPU."""
    assert _LIBRARY is not None
    hidden_width = 0 if w1 is None else w1.shape[0]
    call = _Call(x, hidden_width, gate, relu, normalization)
    rows = statistics_rows(normalization, normalize_shortcut)
    outputs = empty_outputs(call.x, rows, hidden_width)
    block = call.block
    block.kind = 0 if shortcut is None else 2 if normalize_shortcut else 1
    block.norm = call.norm(weight, bias, running_mean, running_var, eps=eps)
    if normalize_shortcut:
        block.shortcut_norm = call.norm(
            shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, eps=shortcut_eps
        )
    block.shortcut = call.like_x(shortcut)
    block.w1, block.b1 = call.parameter(w1), call.parameter(b1)
    block.w2, block.b2 = call.parameter(w2), call.parameter(b2)
    y, statistics, squeezed, hidden, gates = outputs
    block.y, block.statistics = y.data_ptr(), statistics.data_ptr()
    block.squeezed, block.hidden = squeezed.data_ptr(), hidden.data_ptr()
    block.gates = gates.data_ptr()
    call.run(_LIBRARY.senet_tail_forward)
    return outputs


def tail_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    shortcut: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    statistics: Tensor,
    squeezed: Tensor,
    hidden: Tensor,
    gates: Tensor,
    normalization: str,
    normalize_shortcut: bool,
    gate: str,
    relu: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """`senet.ops.algebra.tail_backward` in C++, for a non-empty x on the CPU."""
    assert _LIBRARY is not None
    hidden_width = hidden.shape[1]
    call = _Call(x, hidden_width, gate, relu, normalization)
    block = call.block
    block.kind = 2 if normalize_shortcut else 1 if relu and y is not None else 0
    block.norm = call.norm(weight, bias, None, None, eps=0.0)
    block.shortcut_norm = call.norm(shortcut_weight, shortcut_bias, None, None, eps=0.0)
    block.gradient, block.y = call.like_x(gradient), call.like_x(y)
    block.shortcut = call.like_x(shortcut)
    block.w1, block.w2 = call.parameter(w1), call.parameter(w2)
    block.statistics, block.squeezed = call.parameter(statistics), call.parameter(squeezed)
    block.hidden, block.gates = call.parameter(hidden), call.parameter(gates)
    found = empty_gradients(call.x, hidden_width, wanted)
    names = [name for name, want in zip(GRADIENTS, wanted, strict=True) if want]
    for name, out in zip(names, found, strict=True):
        setattr(block, f"d{name}", out.data_ptr())
    if wanted[1] and not relu and not normalize_shortcut:
        found[names.index("shortcut")].copy_(gradient)
        block.dshortcut = None
    call.run(_LIBRARY.senet_tail_backward)
    return found
