"""A BN → ReLU's output that nobody keeps: computed once more where a backward pass needs it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from senet.ops.cpu.tail import relu_of_normalized
from senet.ops.operators import TAIL
from senet.ops.tail import Saved


class _Again:
    """y = relu(norm(x)) of the C++ kernels without gate and shortcut, to be computed once more.

    Keeps what the operator's own backward pass keeps anyway. PyTorch refuses that pass when one of
    these tensors has been changed in between, so a wrong y cannot go unnoticed.
    """

    def __init__(self, saved: Saved) -> None:
        self.x, self.weight, self.bias = saved.x.detach(), saved.weight, saved.bias
        self.statistics = saved.statistics

    def __call__(self) -> Tensor:
        return relu_of_normalized(self.x, self.weight, self.bias, self.statistics)


def recomputed(y: Tensor) -> AbstractContextManager[Any]:
    """Operations in this context that would keep y for their backward pass compute it again there.

    Costs one pass (y from x) and saves the map. For y from the C++ kernels' BN → ReLU; for any
    other one, and where somebody else already decides what is kept (torch.utils.checkpoint,
    torch.autograd.graph.save_on_cpu), nothing changes.
    """
    autograd: Any = torch._C._autograd
    if (
        not autograd._saved_tensors_hooks_is_enabled()
        or autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return nullcontext()
    saved: Saved | None = TAIL.saved_by(y.grad_fn, "cpu")
    if saved is None or not saved.relu:
        return nullcontext()
    if saved.y is not None or saved.shortcut is not None or saved.w1 is not None:
        return nullcontext()
    again, address, shape = _Again(saved), y.data_ptr(), y.shape

    def pack(t: Tensor) -> Tensor | _Again:
        return again if t.data_ptr() == address and t.shape == shape else t

    def unpack(kept: Tensor | _Again) -> Tensor:
        return kept() if isinstance(kept, _Again) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
