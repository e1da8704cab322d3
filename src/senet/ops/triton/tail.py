"""The tail in Triton: `forward` and `backward`, for a non-empty x that `takes` accepts.

Forward: moments of x (and of a normalized shortcut) in chunks, merged into statistics; the gate in
two products; one pass for y. Backward: one pass for the masked gradient and its sums, the gate's
gradients, one pass for dx. Everything is launched without looking at a value, so CUDA graphs
capture it, and every sum has a fixed order, so the same input gives the same bits on the same
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senet.ops.description import Momenta, move_running
from senet.ops.maps import dense
from senet.ops.tail import (
    Arguments,
    Gradients,
    Outputs,
    Saved,
    empty_gradients,
    empty_outputs,
    final_activation,
)
from senet.ops.triton.common import GATE_BLOCKS, Call, like, moves_in_kernel, numbers, on


def forward(a: Arguments, momenta: Momenta | None) -> Outputs:
    """y and what `backward` needs."""
    a = a._replace(x=dense(a.x.detach()))
    x, other, normalization = a.x, a.normalize_shortcut, a.normalization
    momentum, shortcut_momentum = (None, None) if momenta is None else momenta
    with on(x):
        call = Call(x, 0 if a.w1 is None else a.w1.shape[0])
        dtype, batch, normalized = call.dtype, normalization == "batch", normalization != "none"
        outputs = empty_outputs(a)
        y, statistics, squeezed, hidden, gates = outputs
        assert squeezed is not None
        shortcut = like(None if a.shortcut is None else a.shortcut.detach(), x)
        weight, bias, s_weight, s_bias = (
            numbers(t, dtype) for t in (a.weight, a.bias, a.shortcut_weight, a.shortcut_bias)
        )
        w1, b1, w2, b2 = (numbers(t, dtype) for t in (a.w1, a.b1, a.w2, a.b2))
        moments: tuple[Tensor | None, Tensor | None] = (None, None)
        if batch or call.H:
            moments = call.moments(x, second=batch)
            if call.H and call.sums.splits == 1:
                assert moments[0] is not None
                squeezed = moments[0]
            elif call.H and moments[0] is not None:
                call.merge(moments[0], squeezed, mean=True)
        own = (0, x, a.running_mean, a.running_var, a.eps, momentum)
        norms: list[tuple[Any, ...]] = [own] if normalized else []
        if other:
            running = (a.shortcut_mean, a.shortcut_var)
            norms.append((3, shortcut, *running, a.shortcut_eps, shortcut_momentum))
        for row, map_, run_mean, run_var, epsilon, moved in norms:
            if batch:
                of_map = moments if row == 0 else call.moments(map_, second=True)
                inside = moved is not None and moves_in_kernel(run_mean, run_var, dtype)
                running = (run_mean, run_var) if inside else (None, None)
                call.statistics(
                    statistics, row, of_map, running, epsilon, moved if inside else None
                )
                if not inside:
                    move_running(run_mean, run_var, moved, statistics[row:])
            else:
                running = (numbers(run_mean, dtype), numbers(run_var, dtype))
                call.statistics(statistics, row, (None, None), running, epsilon, None)
        sizes, blocks = (call.N, call.C, call.H), {"HIDDEN": "relu", "ACC": call.acc, **GATE_BLOCKS}
        if call.H:
            call.launch(
                call.gate.hidden_kernel,
                call.tiles((call.N, "BLOCK_N"), (call.H, "BLOCK_H")),
                *(squeezed, statistics, weight, bias, w1, b1, hidden, *sizes),
                NORMALIZED=normalized,
                **blocks,
            )
            call.launch(
                call.gate.gates_kernel,
                call.tiles((call.N, "BLOCK_N"), (call.C, "BLOCK_C")),
                *(hidden, w2, b2, gates, *sizes),
                GATE=a.gate,
                **blocks,
            )
        cut = call.element
        call.launch(
            call.maps.tail_kernel,
            cut.programs,
            *(x, shortcut, y, statistics, weight, bias, s_weight, s_bias),
            *(gates if call.H else None, call.C, call.P, cut.splits, cut.tiles),
            NORMALIZED=normalized,
            OTHER=other,
            ACTIVATION=final_activation(a),
            SLOPE=a.negative_slope,
            ACC=call.acc,
            **cut.constants,
        )
    return Outputs(y, statistics, squeezed, hidden, gates)


def backward(gradient: Tensor, saved: Saved, wanted: Gradients[bool]) -> Gradients[Tensor | None]:
    """The gradients that are wanted, from that of y."""
    saved = saved._replace(x=dense(saved.x.detach()))
    x, statistics, other = saved.x, saved.statistics, saved.normalize_shortcut
    with on(x):
        call = Call(x, 0 if saved.w1 is None else saved.w1.shape[0])
        dtype, found = call.dtype, empty_gradients(saved, wanted)
        g, kept_y, r = (like(t, x) for t in (gradient, saved.y, saved.shortcut))
        assert g is not None
        weight, bias, s_weight, s_bias = (
            numbers(t, dtype)
            for t in (saved.weight, saved.bias, saved.shortcut_weight, saved.shortcut_bias)
        )
        w1, w2 = numbers(saved.w1, dtype), numbers(saved.w2, dtype)
        flags = {"NORMALIZED": saved.normalization != "none", "ACC": call.acc}
        activation = final_activation(saved)
        mask = "none" if activation == "linear" else "y" if kept_y is not None else "again"
        behind = {"ACTIVATION": activation, "SLOPE": saved.negative_slope}
        affine = (statistics, weight, bias, s_weight, s_bias)
        plain = None if other else found.shortcut
        parameters = wanted.weight or wanted.bias or any(wanted[6:])
        batch, gated = saved.normalization == "batch", call.H > 0
        gates = saved.gates if gated else None
        branch = parameters or (wanted.x and (batch or gated))
        channels: tuple[Tensor | None, ...] = (None,) * 4
        dz = None
        if branch or other or plain is not None:
            cut = call.sums
            parts = call.empty(3, call.N * cut.splits, call.C)
            call.launch(
                call.maps.sums_kernel,
                cut.programs,
                *(g, x, kept_y, r, plain, parts, *affine, gates),
                *(call.C, call.P, call.N * cut.splits, cut.splits, cut.tiles),
                OTHER=other,
                MASK=mask,
                BRANCH=branch,
                **behind,
                **flags,
                **cut.constants,
            )
            # It is the gradient behind the activation, rounded to what the maps are stored in.
            if plain is not None and (activation == "relu" or x.dtype == dtype):
                g, mask, r = plain, "none", None
            sums = parts
            if cut.splits > 1 and (branch or other):
                sums = call.empty(3, call.N, call.C)
                call.merge(parts, sums, mean=False)
            if branch and gated:
                dz = _gate_gradients(call, saved, sums, (weight, bias, w1, w2), flags, found)
            if branch or other:
                channels = tuple(call.empty(call.C) if t is None else t for t in found[2:6])
                call.launch(
                    call.gate.channel_gradients_kernel,
                    -(-call.C // 16),
                    *(sums, gates, dz, saved.squeezed, statistics, *channels),
                    *(call.N, call.C),
                    OTHER=other,
                    BRANCH=branch,
                    BLOCK_N=64,
                    BLOCK_C=16,
                    **flags,
                )
        dshortcut = found.shortcut if other else None
        if found.x is not None or dshortcut is not None:
            cut = call.element
            call.launch(
                call.maps.map_gradients_kernel,
                cut.programs,
                *(g, x, kept_y, r, found.x, dshortcut, *affine, gates),
                *(dz, *channels, call.C, call.P, call.M, cut.splits, cut.tiles),
                BATCH=batch,
                OTHER=other,
                MASK=mask,
                **behind,
                **flags,
                **cut.constants,
            )
    return found


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
    with on(x):
        call = Call(x, 0)
        y, cut = torch.empty_like(x), call.element
        shortcut = like(None if shortcut is None else shortcut.detach(), x)
        call.launch(
            call.maps.tail_kernel,
            cut.programs,
            *(x, shortcut, y, None, None, numbers(bias, call.dtype), None, None),
            *(numbers(gates, call.dtype), call.C, call.P, cut.splits, cut.tiles),
            NORMALIZED=False,
            OTHER=False,
            ACTIVATION="relu" if relu else "linear",
            SLOPE=0.0,
            ACC=call.acc,
            **cut.constants,
        )
    return y


def _gate_gradients(
    call: Call,
    saved: Saved,
    sums: Tensor,
    parameters: tuple[Tensor | None, ...],
    flags: dict[str, Any],
    found: Gradients[Tensor | None],
) -> Tensor:
    """Fill the gradients of the gate's weights that are wanted; returns dz (N,C).

    Args:
        call: of the map.
        saved: of the operator.
        sums: (2|3,N,C) of `sums_kernel`, merged over an image.
        parameters: weight, bias, w1, w2 as numbers of the accumulation type.
        flags: compile-time constants of all kernels.
        found: where the gradients go.
    """
    weight, bias, w1, w2 = parameters
    gates, hidden, statistics = saved.gates, saved.hidden, saved.statistics
    sizes = (call.N, call.C, call.H)
    dhidden, dz = call.empty(call.N, call.H), call.empty(call.N, call.C)
    kernels, options = call.gate, {"GATE": saved.gate, "HIDDEN": "relu", **flags, **GATE_BLOCKS}
    call.launch(
        kernels.hidden_gradient_kernel,
        call.tiles((call.N, "BLOCK_N"), (call.H, "BLOCK_H")),
        *(sums, gates, hidden, statistics, weight, bias, w2, dhidden, *sizes),
        **options,
    )
    call.launch(
        kernels.squeeze_gradient_kernel,
        call.tiles((call.N, "BLOCK_N"), (call.C, "BLOCK_C")),
        *(dhidden, w1, dz, *sizes),
        ACC=call.acc,
        **GATE_BLOCKS,
    )
    outputs = (found.w1, found.b1, found.w2, found.b2)
    if any(t is not None for t in outputs):
        call.launch(
            kernels.weight_gradients_kernel,
            call.tiles((call.H, "BLOCK_H"), (call.C, "BLOCK_C")),
            *(sums, gates, hidden, dhidden, saved.squeezed, statistics, weight, bias),
            *(*outputs, *sizes),
            **options,
        )
    return dz
