"""The operator: squeeze-and-excitation at no extra memory traffic, forward and backward.

`squeeze_excite` is the block alone, `bn_se_add_relu` the end of a residual branch (BN → SE → add →
ReLU, each part optional) in the two passes over memory that its batch norm needs anyway,
`bn_relu_concat_se` the end of an Inception module (BN → ReLU of each branch, joined, → SE). Four
implementations agree:

- `reference`: the paper's equations in plain PyTorch, the oracle; it alone has double backward.
- `algebra`: the closed-form backward in pure PyTorch; any device, and what torch.compile fuses.
- `cpu`: C++ and OpenMP kernels for float32, bfloat16 and float64 on the CPU.
- `triton`: Triton kernels for CUDA and ROCm tensors; elsewhere in its interpreter, for tests.

`auto`, the default, takes `triton` or `cpu` where it can and `algebra` elsewhere. Choose with
`use`, or with the environment variable SENET_OPS.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from senet import kernels
from senet.errors import UserError
from senet.ops import algebra, checks, cpu, join, join_operators, operators, reference, triton
from senet.ops.operators import recomputed
from senet.ops.reference import GATES, BatchNorm

__all__ = [
    "GATES",
    "BatchNorm",
    "Implementation",
    "bn_relu_concat_se",
    "bn_se_add_relu",
    "implementations",
    "recomputed",
    "squeeze_excite",
    "use",
]

_NO_NORM = BatchNorm(None, None, None, None)
_NAMES = ("auto", "reference", "algebra", "cpu", "triton")


@dataclass(frozen=True)
class Implementation:
    """One implementation of the operators, as it is on this machine.

    Attributes:
        name: what `use` takes.
        available: whether it can run here.
        reason: why not and what to do about it; for an available one, what it uses.
    """

    name: str
    available: bool
    reason: str


def implementations() -> dict[str, Implementation]:
    """Which implementations are available here, and why the others are not."""
    isa = kernels.instruction_set()
    reason = kernels.MISSING or f"C++ kernels for {isa}"
    return {
        "reference": Implementation("reference", True, "plain PyTorch, any device"),
        "algebra": Implementation("algebra", True, "closed-form PyTorch, any device"),
        "cpu": Implementation("cpu", not kernels.MISSING, reason),
        "triton": Implementation(
            "triton", not triton.missing(), triton.missing() or triton.description()
        ),
    }


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise UserError(f"{source} is {name!r}; choose one of {', '.join(_NAMES)}")
    if name == "cpu" and kernels.MISSING:
        raise UserError(f"{source} is 'cpu', which is not available: {kernels.MISSING}")
    if name == "triton" and (why_not := triton.missing()):
        raise UserError(f"{source} is 'triton', which is not available: {why_not}")
    triton.requested = name == "triton"
    return name


_implementation = _checked(os.environ.get("SENET_OPS") or "auto", "the environment's SENET_OPS")


def use(name: str) -> AbstractContextManager[None]:
    """Choose the implementation of the process, at once; as a context manager, until its end.

    Args:
        name: "reference", "algebra", "cpu", "triton" or "auto" (the default: "triton" for tensors
            on a GPU and "cpu" for those on the CPU that these can take, otherwise "algebra").

    Raises:
        UserError: unknown or unavailable implementation.

    Example:
        >>> with senet.ops.use("reference"):
        ...     y = model(x)
    """
    global _implementation
    previous = _implementation
    _implementation = _checked(name, "the implementation")
    return _restoring(previous)


@contextmanager
def _restoring(previous: str) -> Iterator[None]:
    global _implementation
    try:
        yield
    finally:
        _implementation = _checked(previous, "the implementation")


def _warn_missing_kernels() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"senet runs without its C++ kernels, several times slower: {kernels.MISSING}. "
            'senet.ops.use("algebra") or SENET_OPS=algebra silences this',
            stacklevel=4,
        )


_warned = False


def _resolve(x: Tensor) -> str:
    """The implementation for x under the current choice."""
    compiling = torch.compiler.is_compiling()
    if _implementation == "auto":
        on_gpu = x.device.type == "cuda"
        why_not = triton.unsupported(x) if on_gpu else cpu.unsupported(x)
        if why_not == kernels.MISSING != "" and x.device.type == "cpu" and not compiling:
            _warn_missing_kernels()
        if not compiling and torch._C._functorch.peek_interpreter_stack():
            why_not = why_not or "torch.func transforms cannot look into the kernels"
        return "algebra" if why_not else "triton" if on_gpu else "cpu"
    fast = {"cpu": cpu, "triton": triton}.get(_implementation)
    if fast is not None and (why_not := fast.unsupported(x)):
        raise UserError(f'{why_not}; use senet.ops.use("auto") or "algebra"')
    return _implementation


def _run(
    implementation: str,
    arguments: tuple[Any, ...],
    momentum: float | None = None,
    shortcut_momentum: float | None = None,
) -> Tensor:
    """y of `senet::tail`; moves the running statistics among its arguments where momenta are given.

    All implementations but the oracle.
    """
    output: algebra.TailOutput
    if implementation == "algebra":
        output = operators.by_algebra(arguments)
    elif not torch.compiler.is_compiling() and operators.is_unobserved(arguments):
        y: Tensor = operators.DirectTail.apply(*arguments, momentum, shortcut_momentum)
        return y
    else:
        output = torch.ops.senet.tail(*arguments)
    statistics = output[1]
    if momentum is not None:
        _update_running(arguments[4], arguments[5], momentum, statistics[:3])
    if shortcut_momentum is not None:
        _update_running(arguments[8], arguments[9], shortcut_momentum, statistics[3:])
    return output[0]


def squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, gate: str = "sigmoid"
) -> Tensor:
    """y = s ⊙ x with s = gate(W2 relu(W1 mean(x) + b1) + b2): equations 2 to 4 of the paper.

    The mean and the gate are computed in at least float32, also under autocast.

    Args:
        x: (N,C,*spatial) with one to three spatial axes; channels_last is the fast layout.
        w1: (h,C), or (h,C,1,1) as of a 1x1 convolution.
        b1: (h,) or None.
        w2: (C,h) or (C,h,1,1).
        b2: (C,) or None.
        gate: "sigmoid", "tanh", "relu", "hard_sigmoid" or "identity_sigmoid" (2 * sigmoid).

    Returns:
        (N,C,*spatial), dtype and layout of x.

    Raises:
        UserError: shapes that do not fit, an unknown gate, or an implementation chosen with `use`
            that cannot take x.
    """
    if not torch.jit.is_tracing():  # sizes are tensors there, and comparing them warns
        checks.check_maps(x, None)
        checks.check_gate(x.shape[1], w1, b1, w2, b2, gate)
    implementation = _resolve(x)
    if implementation == "reference":
        return reference.squeeze_excite(x, w1, b1, w2, b2, gate)
    absent = (None,) * 9
    options = ("none", False, 0.0, 0.0, gate, False)
    return _run(implementation, (x, *absent, w1, b1, w2, b2, *options))


def bn_se_add_relu(
    x: Tensor,
    shortcut: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    gate: str = "sigmoid",
    relu: bool = True,
    shortcut_norm: BatchNorm | None = None,
) -> Tensor:
    """y = relu(s ⊙ BN(x) + shortcut), s the squeeze-and-excitation gate of BN(x).

    Parts are left out by None or False: no gate (w1, b1, w2, b2 None) gives BN → add → ReLU, no
    shortcut BN → SE → ReLU, `relu=False` no ReLU. For the backward pass only x and y are kept
    (without a shortcut or with a normalized one, x and the shortcut).

    Args:
        x: (N,C,*spatial) with one to three spatial axes; channels_last is the fast layout.
        shortcut: like x, or None.
        bn_weight: (C,), or None for 1.
        bn_bias: (C,), or None for 0.
        running_mean: (C,) or None; updated in training, used otherwise.
        running_var: (C,) or None; updated in training with the unbiased variance.
        w1: (h,C), or (h,C,1,1) as of a 1x1 convolution; None for no gate.
        b1: (h,) or None.
        w2: (C,h) or (C,h,1,1); None for no gate.
        b2: (C,) or None.
        training: normalize by the batch's statistics. Without running statistics this is done
            always, as `torch.nn.BatchNorm2d` does.
        momentum: weight of the batch in the running statistics (the cumulative average of
            `BatchNorm2d(momentum=None)` is the caller's to resolve).
        eps: added to the variance.
        gate: as in `squeeze_excite`; not used without w1 and w2.
        relu: whether the ReLU is applied.
        shortcut_norm: normalization of the shortcut (a projection's), in the same pass.

    Returns:
        (N,C,*spatial), layout of x, dtype that x + shortcut has.

    Raises:
        UserError: shapes that do not fit, an unknown gate, or an implementation chosen with `use`
            that cannot take x.
        ValueError: batch statistics of a single value per channel.
    """
    norm = BatchNorm(bn_weight, bn_bias, running_mean, running_var, momentum, eps)
    batch = training or running_mean is None
    if not torch.jit.is_tracing():  # sizes are tensors there, and comparing them warns
        checks.check_maps(x, shortcut)
        checks.check_gate(x.shape[1], w1, b1, w2, b2, gate)
        checks.check_norms(x, shortcut, norm, shortcut_norm, batch, training)
    if shortcut is not None and shortcut.dtype != x.dtype:
        common = torch.promote_types(x.dtype, shortcut.dtype)
        x, shortcut = x.to(common), shortcut.to(common)
    implementation = _resolve(x)
    empty = not torch.jit.is_tracing() and x.numel() == 0
    if implementation == "reference" and not empty:
        return reference.bn_se_add_relu(
            x,
            shortcut,
            norm,
            w1,
            b1,
            w2,
            b2,
            training=training,
            gate=gate,
            relu=relu,
            shortcut_norm=shortcut_norm,
        )
    other = shortcut_norm or _NO_NORM
    arguments = (
        x,
        shortcut,
        *norm[:4],
        *other[:4],
        w1,
        b1,
        w2,
        b2,
        "batch" if batch else "running",
        shortcut_norm is not None,
        eps,
        other.eps,
        gate,
        relu,
    )
    update = training and not empty
    return _run(
        "algebra" if implementation == "reference" else implementation,
        arguments,
        norm.momentum if update else None,
        other.momentum if update and shortcut_norm is not None else None,
    )


def bn_relu_concat_se(
    maps: Sequence[Tensor],
    norms: Sequence[BatchNorm | None],
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    training: Sequence[bool],
    gate: str = "sigmoid",
) -> Tensor:
    """y = s ⊙ concat(relu(BN(x_i))), s the squeeze-and-excitation gate of the concat.

    The sums of the squeeze are taken before the concat is written, which is written once and never
    read. For the backward pass only the maps are kept.

    Args:
        maps: (N,C_i,*spatial) each, with one to three spatial axes; channels_last is the fast
            layout. C = ΣC_i.
        norms: batch norm of each map, a ReLU behind it; None takes a map as it is, without ReLU.
            Running statistics are updated in training, used otherwise.
        w1: (h,C), or (h,C,1,1) as of a 1x1 convolution; None for no gate (s = 1).
        b1: (h,) or None.
        w2: (C,h) or (C,h,1,1); None for no gate.
        b2: (C,) or None.
        training: of each map whether to normalize by the batch's statistics. Without running
            statistics this is done always, as `torch.nn.BatchNorm2d` does.
        gate: as in `squeeze_excite`; not used without w1 and w2.

    Returns:
        (N,C,*spatial), dtype that the concatenated maps have.

    Raises:
        UserError: shapes that do not fit, an unknown gate, or an implementation chosen with `use`
            that cannot take the maps.
        ValueError: batch statistics of a single value per channel.
    """
    if not torch.jit.is_tracing():
        checks.check_join(maps, norms, training, (w1, b1, w2, b2), gate)
    common = functools.reduce(torch.promote_types, (x.dtype for x in maps))
    maps = [x.to(common) for x in maps]
    own = [
        norm is not None and (train or norm.running_mean is None)
        for norm, train in zip(norms, training, strict=True)
    ]
    update = [train and maps[0].numel() > 0 for train in training]
    implementation = _resolve(maps[0])
    if implementation == "reference" and maps[0].numel() > 0:
        return reference.bn_relu_concat_se(
            maps, list(norms), w1, b1, w2, b2, training=list(training), gate=gate
        )
    if implementation == "triton":
        return _joined_by_tails(maps, norms, training, (w1, b1, w2, b2), gate)
    given = [norm or _NO_NORM for norm in norms]
    kinds = [
        join.NONE if norm is None else join.BATCH if batch else join.RUNNING
        for norm, batch in zip(norms, own, strict=True)
    ]
    options = (kinds, [norm.eps for norm in given], gate)
    tensors: list[list[Any]] = [maps, *([norm[i] for norm in given] for i in range(4))]
    if implementation == "cpu":
        y, statistics, *_ = torch.ops.senet.join(*tensors, w1, b1, w2, b2, *options)
    else:
        flat = [*(t for group in tensors for t in group), w1, b1, w2, b2]
        y, statistics, *_ = join_operators.by_algebra(options, flat)
    rows = statistics.split([x.shape[1] for x in maps], 1)
    for norm, move, row in zip(given, update, rows, strict=True):
        if move:
            _update_running(norm.running_mean, norm.running_var, norm.momentum, row)
    return y


def _joined_by_tails(
    maps: Sequence[Tensor],
    norms: Sequence[BatchNorm | None],
    training: Sequence[bool],
    gate_parameters: checks.GateParameters,
    gate: str,
) -> Tensor:
    """`bn_relu_concat_se` by the other two operators: three more passes, on kernels for GPUs."""
    parts = [
        x
        if norm is None
        else bn_se_add_relu(
            x, None, *norm[:4], training=train, momentum=norm.momentum, eps=norm.eps
        )
        for x, norm, train in zip(maps, norms, training, strict=True)
    ]
    y = torch.cat(parts, 1)
    w1, b1, w2, b2 = gate_parameters
    return y if w1 is None or w2 is None else squeeze_excite(y, w1, b1, w2, b2, gate)


def _update_running(
    mean: Tensor | None, var: Tensor | None, momentum: float, statistics: Tensor
) -> None:
    """Move the running statistics by `momentum` towards statistics' rows 0 (mean) and 2 (var)."""
    if mean is None or var is None:
        return
    with torch.no_grad():
        for running, row in ((mean, 0), (var, 2)):
            running.lerp_(statistics[row].to(running.dtype), momentum)
