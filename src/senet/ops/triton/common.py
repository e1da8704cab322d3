"""What the Triton kernels take, and what all launches for a map share."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from senet.ops.maps import accumulator
from senet.ops.triton.tiling import tiling

STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GATE_BLOCKS = {"BLOCK_N": 16, "BLOCK_H": 16, "BLOCK_C": 64}

# Looked up here: torch.compile follows what a call asks, but not into Python's importer.
_INSTALLED = importlib.util.find_spec("triton") is not None

requested = False  # whether the implementation chosen by name is "triton"; set by `senet.ops.use`


def interpreted() -> bool:
    """Whether Triton runs its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str:
    """Why no tensor can be taken here; empty if some can."""
    if not _INSTALLED:
        return "Triton is not installed; on Linux `pip install triton`"
    if interpreted() or torch.cuda.is_available():
        return ""
    return (
        "there is no CUDA or ROCm GPU here (TRITON_INTERPRET=1 in the environment runs the kernels "
        "in Triton's interpreter, slowly, for tests)"
    )


def description() -> str:
    """What the kernels run on, for `senet.ops.implementations`."""
    if interpreted():
        return "Triton kernels in the interpreter, on request only"
    return f"Triton kernels for {torch.cuda.get_device_name()}"


def _too_old(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is None and found.major < 7:
        return f"Triton needs compute capability 7.0, this GPU has {found.major}.{found.minor}"
    return ""


def unsupported(x: Tensor) -> str:
    """Why the kernels cannot take x; empty if they can."""
    on_gpu = x.device.type == "cuda"
    if not (on_gpu and _INSTALLED) and (why_not := missing()):
        return why_not
    if x.dtype not in STORAGE:
        return f"the Triton kernels take float32, float16, bfloat16, float64, not {x.dtype}"
    if interpreted():
        return "" if x.device.type == "cpu" else "TRITON_INTERPRET=1 takes tensors on the CPU"
    if not on_gpu:
        return f"the Triton kernels run on CUDA and ROCm devices, the input is on {x.device}"
    return _too_old(x.device.index or 0)


def takes(x: Tensor) -> bool:
    """Whether `senet::tail` hands x to these kernels: on a GPU always, interpreted if asked to."""
    if x.device.type == "cpu" and not (requested and interpreted()):
        return False
    return x.numel() > 0 and not unsupported(x)


def on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t with the shape, type and memory order of x."""
    same = t is not None and t.shape == x.shape and t.stride() == x.stride()
    if t is None or (same and t.dtype is x.dtype):
        return t
    return torch.empty_like(x).copy_(t)


def numbers(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """t as contiguous numbers of the accumulation type."""
    return None if t is None else t.detach().to(dtype).contiguous()


def moves_in_kernel(mean: Tensor | None, var: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether running statistics are as the kernel moves them: float32, without gaps."""
    return dtype == torch.float32 and all(
        t is not None and t.dtype == dtype and t.is_contiguous() for t in (mean, var)
    )


class Call:
    """What all launches for a map x share.

    Args:
        x: the map, dense.
        hidden: width of the gate, 0 for none.
    """

    def __init__(self, x: Tensor, hidden: int) -> None:
        import triton.language as tl

        from senet.ops.triton import gate, kernels, launch

        self.maps, self.gate = kernels, gate
        self.N, self.C, self.H = x.shape[0], x.shape[1], hidden
        self.P = x.numel() // (self.N * self.C)
        self.M = self.N * self.P
        self.dtype = accumulator(x.dtype)
        self.acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        order = self.P == 1 or not x.is_contiguous()
        self.sums = tiling(self.N, self.C, self.P, order, x.dtype)
        self.element = tiling(self.N, self.C, self.P, order, x.dtype, 4)
        self.device = x.device
        self.launch = functools.partial(launch.launch, x.device)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized tensor of the accumulation type."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def tiles(self, *sizes: tuple[int, str]) -> int:
        """Programs: one a tile of the gate's blocks, for each (size, block)."""
        programs = 1
        for size, block in sizes:
            programs *= -(-size // GATE_BLOCKS[block])
        return programs

    def moments(self, x: Tensor, *, second: bool) -> tuple[Tensor, Tensor | None]:
        """Mean and (if `second`) squared deviations (rows,C) of the chunks of x."""
        cut = self.sums
        means = self.empty(self.N * cut.splits, self.C)
        deviations = torch.empty_like(means) if second else None
        self.launch(
            self.maps.moments_kernel,
            cut.programs,
            *(x, means, deviations, self.C, self.P, cut.splits, cut.tiles),
            SECOND=second,
            ACC=self.acc,
            **cut.constants,
        )
        return means, deviations

    def statistics(
        self,
        out: Tensor,
        first_row: int,
        moments: tuple[Tensor | None, Tensor | None],
        running: tuple[Tensor | None, Tensor | None],
        eps: float,
        momentum: float | None,
        affine: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> None:
        """Fill rows of `out` from the moments, or without them from the running ones.

        Three, or five with the weight and bias of a normalization: see `statistics_kernel`.
        """
        cut, block = self.sums, 8
        batch = moments[0] is not None
        self.launch(
            self.maps.statistics_kernel,
            -(-self.C // block),
            *(*moments, *running, out, *(affine or (None, None))),
            *(self.N * cut.splits, cut.splits, cut.chunk),
            *(self.C, self.P, self.M, 0.0 if momentum is None else momentum),
            first_row=first_row,
            EPS=eps,
            BATCH=batch,
            MOVE=batch and momentum is not None,
            AFFINE=affine is not None,
            ACC=self.acc,
            BLOCK_R=128,
            BLOCK_C=block,
        )

    def merge(self, parts: Tensor, out: Tensor, *, mean: bool) -> None:
        """Out (k * N,C) from the chunks' sums or means (k * N * splits,C)."""
        rows, cut = out.numel() // self.C, self.sums
        self.launch(
            self.gate.merge_kernel,
            -(-rows // 8) * -(-self.C // 64),
            *(parts, out, rows, cut.splits, cut.chunk, self.C, self.P),
            MEAN=mean,
            ACC=self.acc,
            BLOCK_R=8,
            BLOCK_C=64,
        )
