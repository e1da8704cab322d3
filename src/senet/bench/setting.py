"""Where a benchmark runs and how precisely: the CPU in float32, a GPU in bfloat16 and with TF32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from senet.errors import UserError

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bf16", "TF32"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Setting:
    """Device and precision of a case, the same for all its contestants.

    Attributes:
        device: "cpu"; "cuda" for a GPU, which is timed by its own events and whose peak memory is
            measured.
        precision: "float32"; "bf16" for bfloat16 maps under autocast; "TF32" for float32 maps
            whose products are TF32 (as are those that autocast leaves in float32).
    """

    device: Device = "cpu"
    precision: Precision = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def claim(self, name: str) -> str:
        """The name of a benchmark with the precision, where it is another than float32."""
        return name if self.precision == "float32" else f"{name}, {self.precision}"

    def noise(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers (N,C,H,W), channels_last, in the dtype of the maps by default."""
        x = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def autocast(self, call: Callable[..., Result]) -> Callable[..., Result]:
        """`call` as the precision has it; the very same where there is nothing to cast."""
        if self.precision != "bf16":
            return call
        return torch.autocast(self.device, torch.bfloat16)(call)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Float32 products are TF32 within, but for the precision float32; afterwards as before."""
        if self.precision == "float32":
            yield
            return
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before

    def seconds(self, run: Callable[[], object], count: int) -> float:
        """Time of `count` calls one after the other; on a GPU between two events of its own."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        began = time.perf_counter()
        for _ in range(count):
            run()
        return time.perf_counter() - began


ON_CPU = Setting()
SETTINGS: Mapping[Device, Sequence[Setting]] = {
    "cpu": (ON_CPU,),
    "cuda": (Setting("cuda", "bf16"), Setting("cuda", "TF32")),
}


def check_device(device: Device) -> None:
    """Raise UserError unless the device is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no CUDA or ROCm GPU here; use --device cpu, or install a "
            "PyTorch build for your GPU (https://pytorch.org/get-started)"
        )


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that a call allocates at most on the GPU, by PyTorch's count, beyond what waits there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    waiting = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - waiting, 1) / 2**20


def called(
    model: torch.nn.Module, *, compiled: bool, mode: str | None = None
) -> Callable[..., Tensor]:
    """What is called to run a model: itself, or torch.compile's version for the first shape."""
    if not compiled:
        return model
    torch.compiler.reset()  # else a second shape compiles for any shape, which is slower
    return torch.compile(model, dynamic=False, mode=mode)
