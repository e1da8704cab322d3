"""Which implementation runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from senet import kernels
from senet.errors import UserError
from senet.ops.cpu import common as cpu
from senet.ops.triton import common as triton

_NAMES = ("auto", "reference", "algebra", "pytorch", "cpu", "triton")
# Below so many bytes a map's passes take less time on a GPU than the launches that save them: on an
# H100 three passes over this take 0.08 ms (docs/performance.md).
LEAST_BYTES_ON_GPU = 2**26


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
        "pytorch": Implementation("pytorch", True, "PyTorch's own functions, any device"),
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
        name: "reference", "algebra", "pytorch", "cpu", "triton" or "auto" (the default: "cpu" for
            tensors on the CPU that it can take; on a GPU "triton" for maps of at least 64 MiB and
            "pytorch" for smaller ones; otherwise "algebra").

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


def chosen() -> str:
    """The name given to `use` last."""
    return _implementation


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


def transforms() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation looks at each operation."""
    stack: Any = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or forward_ad._current_level >= 0


def resolve(x: Tensor) -> str:
    """The implementation for x under the current choice."""
    compiling = torch.compiler.is_compiling()
    if _implementation == "auto":
        on_gpu = x.device.type == "cuda"
        why_not = triton.unsupported(x) if on_gpu else cpu.unsupported(x)
        if why_not == kernels.MISSING != "" and x.device.type == "cpu" and not compiling:
            _warn_missing_kernels()
        if not compiling and transforms():
            return "reference"
        return "algebra" if why_not else "triton" if on_gpu else "cpu"
    if _implementation != "reference" and not compiling and transforms():
        raise UserError(
            f"senet.ops.use({_implementation!r}) cannot run under torch.func's transforms and "
            'forward-mode differentiation; use senet.ops.use("auto") or "reference"'
        )
    fast = {"cpu": cpu, "triton": triton}.get(_implementation)
    if fast is not None and (why_not := fast.unsupported(x)):
        raise UserError(f'{why_not}; use senet.ops.use("auto") or "algebra"')
    return _implementation


def resolve_maps(*maps: Tensor) -> str:
    """The implementation for maps under the current choice, by their size too.

    On a GPU small ones run by PyTorch's own functions, in eager mode: the host needs longer to
    launch the operator's kernels than they gain. The rule knows the maps' shapes and type alone, so
    digits do not depend on a machine.
    """
    found = resolve(maps[0])
    if found != "triton" or _implementation != "auto" or torch.compiler.is_compiling():
        return found
    return found if large(*maps) else "pytorch"


def large(*maps: Tensor) -> bool:
    """Whether maps on a GPU are worth the operator's launches."""
    return sum(x.numel() * x.element_size() for x in maps) >= LEAST_BYTES_ON_GPU


def is_worth_it(x: Tensor) -> bool:
    """Whether a module with x as its input shall run by the operator.

    It shall where kernels run for x, or an implementation that was chosen by name. The maps inside
    may have more channels than x: they are taken to be four times as large.
    """
    if _implementation != "auto":
        return not transforms()
    return resolve_maps(x, x, x, x) in ("cpu", "triton")
