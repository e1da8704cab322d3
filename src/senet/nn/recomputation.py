"""Gradient checkpointing that leaves the running statistics of batch norms alone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from senet.nn.block import leaves_process


def recomputed_backward(step: Callable[[Tensor], Tensor], x: Tensor, within: nn.Module) -> Tensor:
    """step(x), computed again in the backward pass instead of keeping what lies between.

    Random numbers are the same then, and batch norms count the batch once:
    `torch.utils.checkpoint` by itself takes it into their running statistics a second time.

    Args:
        step: a function of x alone.
        x: its input.
        within: the module whose batch norms it runs.
    """
    if leaves_process(x):
        return step(x)
    if torch.compiler.is_compiling():
        # The compiler sees the statistics' change once, and cannot trace the contexts.
        return checkpoint(step, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(within)

    return checkpoint(step, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(within: nn.Module) -> Iterator[None]:
    """Batch norms in training count a batch in copies of their statistics."""
    counting = [
        module
        for module in within.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    own = [dict(module._buffers) for module in counting]
    for module, buffers in zip(counting, own, strict=True):
        for name, tensor in buffers.items():
            module._buffers[name] = None if tensor is None else tensor.clone()
    try:
        yield
    finally:
        for module, buffers in zip(counting, own, strict=True):
            module._buffers.update(buffers)
