"""The Triton kernels behind the signatures of `senet.ops.algebra`, for CUDA and ROCm tensors.

Forward: moments of x (and of a normalized shortcut) in chunks, merged into statistics; the gate in
two products; one pass for y. Backward: one pass for the masked gradient and its sums, the gate's
gradients, one pass for dx. Everything is launched without looking at a value, so CUDA graphs
capture it, and every sum has a fixed order, so the same input gives the same bits on the same
device.

Triton is imported with the first call. With TRITON_INTERPRET=1 in the environment the kernels run
in Triton's interpreter on the CPU, slowly, for tests; only `use("triton")` takes that way.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from senet.ops.algebra import (
    GRADIENTS,
    TailOutput,
    dense,
    empty_gradients,
    empty_outputs,
    statistics_rows,
)
from senet.ops.reference import accumulator
from senet.ops.triton_tiling import tiling

STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_GATE_BLOCKS = {"BLOCK_N": 16, "BLOCK_H": 16, "BLOCK_C": 64}
_BATCH = "batch"

requested = False  # whether the implementation chosen by name is "triton"; set by `senet.ops.use`


def interpreted() -> bool:
    """Whether Triton runs its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str:
    """Why no tensor can be taken here; empty if some can."""
    if importlib.util.find_spec("triton") is None:
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


@functools.cache
def _too_old(index: int) -> str:
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(index)) < (7, 0):
        return f"Triton needs compute capability 7.0, this GPU has {found[0]}.{found[1]}"
    return ""


def unsupported(x: Tensor) -> str:
    """Why the kernels cannot take x; empty if they can."""
    if why_not := missing():
        return why_not
    if x.dtype not in STORAGE:
        return f"the Triton kernels take float32, float16, bfloat16, float64, not {x.dtype}"
    if interpreted():
        return "" if x.device.type == "cpu" else "TRITON_INTERPRET=1 takes tensors on the CPU"
    if x.device.type != "cuda":
        return f"the Triton kernels run on CUDA and ROCm devices, the input is on {x.device}"
    return _too_old(x.device.index or 0)


def takes(x: Tensor) -> bool:
    """Whether `senet::tail` hands x to these kernels: on a GPU always, interpreted if asked to."""
    if x.device.type == "cpu" and not (requested and interpreted()):
        return False
    return x.numel() > 0 and not unsupported(x)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t with the type and memory order of x."""
    if t is None or (t.dtype is x.dtype and t.stride() == x.stride()):
        return t
    return torch.empty_like(x).copy_(t)


def _numbers(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """t as contiguous numbers of the accumulation type."""
    return None if t is None else t.detach().to(dtype).contiguous()


class _Call:
    """What all launches for a map x share.

    Args:
        x: the map, dense.
        hidden: width of the gate, 0 for none.
    """

    def __init__(self, x: Tensor, hidden: int) -> None:
        import triton.language as tl

        from senet.ops import triton_gate, triton_kernels

        self.maps, self.gate = triton_kernels, triton_gate
        self.N, self.C, self.H = x.shape[0], x.shape[1], hidden
        self.P = x.numel() // (self.N * self.C)
        self.M = self.N * self.P
        self.dtype = accumulator(x.dtype)
        self.acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        order = self.P == 1 or not x.is_contiguous()
        self.sums = tiling(self.N, self.C, self.P, order, x.dtype)
        self.element = tiling(self.N, self.C, self.P, order, x.dtype, 4)
        self.device = x.device

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized tensor of the accumulation type."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def tiles(self, *sizes: tuple[int, str]) -> tuple[int]:
        """A grid: one program a tile of the gate's blocks, for each (size, block)."""
        programs = 1
        for size, block in sizes:
            programs *= -(-size // _GATE_BLOCKS[block])
        return (programs,)

    def moments(self, x: Tensor, *, second: bool) -> tuple[Tensor, Tensor | None]:
        """Mean and (if `second`) squared deviations (rows,C) of the chunks of x."""
        cut = self.sums
        means = self.empty(self.N * cut.splits, self.C)
        deviations = torch.empty_like(means) if second else None
        self.maps.moments_kernel[(cut.programs,)](
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
    ) -> None:
        """Fill three rows of `out` from the moments, or without them from the running ones."""
        cut, block = self.sums, 8
        batch = moments[0] is not None
        self.maps.statistics_kernel[(-(-self.C // block),)](
            *(*moments, *running, out, self.N * cut.splits, cut.splits, cut.chunk),
            *(self.C, self.P, self.M, 0.0 if momentum is None else momentum),
            first_row=first_row,
            EPS=eps,
            BATCH=batch,
            MOVE=batch and momentum is not None,
            ACC=self.acc,
            BLOCK_R=128,
            BLOCK_C=block,
        )

    def merge(self, parts: Tensor, out: Tensor, *, mean: bool) -> None:
        """Out (k * N,C) from the chunks' sums or means (k * N * splits,C)."""
        rows, cut = out.numel() // self.C, self.sums
        self.gate.merge_kernel[(-(-rows // 8) * -(-self.C // 64),)](
            *(parts, out, rows, cut.splits, cut.chunk, self.C, self.P),
            MEAN=mean,
            ACC=self.acc,
            BLOCK_R=8,
            BLOCK_C=64,
        )


def _moves_in_kernel(mean: Tensor | None, var: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether running statistics are as the kernel moves them: float32, without gaps."""
    return dtype == torch.float32 and all(
        t is not None and t.dtype == dtype and t.is_contiguous() for t in (mean, var)
    )


def tail(
    x: Tensor,
    *rest: Any,
    momentum: float | None = None,
    shortcut_momentum: float | None = None,
) -> TailOutput:
    """`senet.ops.algebra.tail` in Triton, for a non-empty x that `unsupported` has nothing against.

    Args:
        x: as in `algebra.tail`.
        rest: its other arguments.
        momentum, shortcut_momentum: also move the running statistics of the two normalizations by
            that; None leaves them as they are.
    """
    x = dense(x.detach())
    (shortcut, weight, bias, mean, var, s_weight, s_bias, s_mean, s_var) = rest[:9]
    (w1, b1, w2, b2, normalization, other, eps, s_eps, gate, relu) = rest[9:]
    with _on(x):
        call = _Call(x, 0 if w1 is None else w1.shape[0])
        dtype, batch, normalized = call.dtype, normalization == _BATCH, normalization != "none"
        outputs = empty_outputs(x, statistics_rows(normalization, other), call.H)
        y, statistics, squeezed, hidden, gates = outputs
        shortcut = _like(None if shortcut is None else shortcut.detach(), x)
        weight, bias, s_weight, s_bias, b1, b2, w1, w2 = (
            _numbers(t, dtype) for t in (weight, bias, s_weight, s_bias, b1, b2, w1, w2)
        )
        moments: tuple[Tensor | None, Tensor | None] = (None, None)
        if batch or call.H:
            moments = call.moments(x, second=batch)
            if call.H and call.sums.splits == 1:
                assert moments[0] is not None
                squeezed = moments[0]
            elif call.H and moments[0] is not None:
                call.merge(moments[0], squeezed, mean=True)
        own = (0, x, mean, var, eps, momentum)
        norms: list[tuple[Any, ...]] = [own] if normalized else []
        if other:
            norms.append((3, shortcut, s_mean, s_var, s_eps, shortcut_momentum))
        for row, map_, run_mean, run_var, epsilon, moved in norms:
            if batch:
                of_map = moments if row == 0 else call.moments(map_, second=True)
                inside = moved is not None and _moves_in_kernel(run_mean, run_var, dtype)
                running = (run_mean, run_var) if inside else (None, None)
                call.statistics(
                    statistics, row, of_map, running, epsilon, moved if inside else None
                )
                if moved is not None and not inside and run_mean is not None:
                    for t, source in ((run_mean, row), (run_var, row + 2)):
                        t.lerp_(statistics[source].to(t.dtype), moved)
            else:
                running = (_numbers(run_mean, dtype), _numbers(run_var, dtype))
                call.statistics(statistics, row, (None, None), running, epsilon, None)
        sizes, blocks = (call.N, call.C, call.H), {"ACC": call.acc, **_GATE_BLOCKS}
        if call.H:
            call.gate.hidden_kernel[call.tiles((call.N, "BLOCK_N"), (call.H, "BLOCK_H"))](
                *(squeezed, statistics, weight, bias, w1, b1, hidden, *sizes),
                NORMALIZED=normalized,
                **blocks,
            )
            call.gate.gates_kernel[call.tiles((call.N, "BLOCK_N"), (call.C, "BLOCK_C"))](
                *(hidden, w2, b2, gates, *sizes), GATE=gate, **blocks
            )
        cut = call.element
        call.maps.tail_kernel[(cut.programs,)](
            *(x, shortcut, y, statistics, weight, bias, s_weight, s_bias),
            *(gates if call.H else None, call.C, call.P, cut.splits, cut.tiles),
            NORMALIZED=normalized,
            OTHER=other,
            RELU=relu,
            ACC=call.acc,
            **cut.constants,
        )
    return y, statistics, squeezed, hidden, gates


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
    """`senet.ops.algebra.tail_backward` in Triton, for a non-empty x."""
    x = dense(x.detach())
    with _on(x):
        call = _Call(x, 0 if w1 is None else w1.shape[0])
        dtype, other = call.dtype, normalize_shortcut
        results = empty_gradients(x, call.H, wanted)
        places = iter(results)
        found = {
            name: next(places) if want else None
            for name, want in zip(GRADIENTS, wanted, strict=True)
        }
        g, kept_y, r = (_like(t, x) for t in (gradient, y, shortcut if other else None))
        assert g is not None
        weight, bias, s_weight, s_bias, w1, w2 = (
            _numbers(t, dtype) for t in (weight, bias, shortcut_weight, shortcut_bias, w1, w2)
        )
        flags = {"NORMALIZED": normalization != "none", "ACC": call.acc}
        mask = "none" if not relu else "y" if kept_y is not None else "again"
        affine = (statistics, weight, bias, s_weight, s_bias)
        plain = None if other else found["shortcut"]
        parameters = any(wanted[i] for i in (2, 3, 6, 7, 8, 9))
        batch, gated = normalization == _BATCH, call.H > 0
        branch = parameters or (wanted[0] and (batch or gated))
        channels: tuple[Tensor | None, ...] = (None,) * 4
        dz = None
        if branch or other or plain is not None:
            cut = call.sums
            parts = call.empty(3, call.N * cut.splits, call.C)
            call.maps.sums_kernel[(cut.programs,)](
                *(g, x, kept_y, r, plain, parts, *affine, gates if gated else None),
                *(call.C, call.P, call.N * cut.splits, cut.splits, cut.tiles),
                OTHER=other,
                MASK=mask,
                BRANCH=branch,
                **flags,
                **cut.constants,
            )
            if plain is not None:  # it is the gradient behind the relu
                g, mask = plain, "none"
            sums = parts
            if cut.splits > 1 and (branch or other):
                sums = call.empty(3, call.N, call.C)
                call.merge(parts, sums, mean=False)
            if branch and gated:
                small = (squeezed, hidden, gates, weight, bias, w1, w2)
                dz = _gate_gradients(call, sums, statistics, small, gate, flags, found)
            if branch or other:
                names = ("weight", "bias", "shortcut_weight", "shortcut_bias")
                channels = tuple(
                    call.empty(call.C) if found[name] is None else found[name] for name in names
                )
                call.gate.channel_gradients_kernel[(-(-call.C // 16),)](
                    *(sums, gates if gated else None, dz, squeezed, statistics, *channels),
                    *(call.N, call.C),
                    OTHER=other,
                    BRANCH=branch,
                    BLOCK_N=64,
                    BLOCK_C=16,
                    **flags,
                )
        dshortcut = found["shortcut"] if other else None
        if found["x"] is not None or dshortcut is not None:
            cut = call.element
            call.maps.map_gradients_kernel[(cut.programs,)](
                *(g, x, kept_y, r, found["x"], dshortcut, *affine, gates if gated else None),
                *(dz, *channels, call.C, call.P, call.M, cut.splits, cut.tiles),
                BATCH=batch,
                OTHER=other,
                MASK=mask,
                **flags,
                **cut.constants,
            )
    return results


def finish(
    x: Tensor, bias: Tensor | None, gates: Tensor | None, shortcut: Tensor | None, relu: bool
) -> Tensor:
    """relu(gates ⊙ (x + bias) + shortcut) in one pass, for an x that `takes` accepts.

    Args:
        x: (N,C,*), for instance a convolution's output.
        bias: (C,) or None.
        gates: (N,C) or None for 1.
        shortcut: like x, or None.
        relu: whether the ReLU is applied.

    Returns:
        Like x; no gradient is recorded.
    """
    x = dense(x.detach())
    with _on(x):
        call = _Call(x, 0)
        y, cut = torch.empty_like(x), call.element
        shortcut = _like(None if shortcut is None else shortcut.detach(), x)
        call.maps.tail_kernel[(cut.programs,)](
            *(x, shortcut, y, None, None, _numbers(bias, call.dtype), None, None),
            *(_numbers(gates, call.dtype), call.C, call.P, cut.splits, cut.tiles),
            NORMALIZED=False,
            OTHER=False,
            RELU=relu,
            ACC=call.acc,
            **cut.constants,
        )
    return y


def _gate_gradients(
    call: _Call,
    sums: Tensor,
    statistics: Tensor,
    small: tuple[Tensor | None, ...],
    gate: str,
    flags: dict[str, Any],
    found: dict[str, Tensor | None],
) -> Tensor:
    """Fill the gradients of the gate's weights that are wanted; returns dz (N,C)."""
    squeezed, hidden, gates, weight, bias, w1, w2 = small
    sizes = (call.N, call.C, call.H)
    dhidden, dz = call.empty(call.N, call.H), call.empty(call.N, call.C)
    kernels, options = call.gate, {"GATE": gate, **flags, **_GATE_BLOCKS}
    kernels.hidden_gradient_kernel[call.tiles((call.N, "BLOCK_N"), (call.H, "BLOCK_H"))](
        *(sums, gates, hidden, statistics, weight, bias, w2, dhidden, *sizes), **options
    )
    kernels.squeeze_gradient_kernel[call.tiles((call.N, "BLOCK_N"), (call.C, "BLOCK_C"))](
        *(dhidden, w1, dz, *sizes), ACC=call.acc, **_GATE_BLOCKS
    )
    outputs = [found[name] for name in ("w1", "b1", "w2", "b2")]
    if any(t is not None for t in outputs):
        kernels.weight_gradients_kernel[call.tiles((call.H, "BLOCK_H"), (call.C, "BLOCK_C"))](
            *(sums, gates, hidden, dhidden, squeezed, statistics, weight, bias, *outputs, *sizes),
            **options,
        )
    return dz
