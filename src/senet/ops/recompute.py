"""A tail's output that nobody keeps: computed once more where a backward pass needs it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from senet.ops.cpu.join import once_more
from senet.ops.cpu.tail import relu_of_normalized
from senet.ops.join import NONE
from senet.ops.join import Saved as SavedOfJoin
from senet.ops.operators import JOIN, TAIL
from senet.ops.tail import Saved

# Both keep what the operator's own backward pass keeps anyway. PyTorch refuses that pass when one
# of these tensors has been changed in between, so a wrong y cannot go unnoticed.


def _of_tail(node: Any) -> Callable[[], Tensor] | None:
    """What computes y = relu(norm(x)) once more; None for any other tail."""
    saved: Saved | None = TAIL.saved_by(node, "cpu")
    if saved is None or not saved.relu:
        return None
    if saved.y is not None or saved.shortcut is not None or saved.w1 is not None:
        return None
    x = saved.x.detach()
    return partial(relu_of_normalized, x, saved.weight, saved.bias, saved.statistics)


def _of_join(node: Any) -> Callable[[], Tensor] | None:
    """What computes y = s ⊙ act(norm(x)) once more; None for several branches."""
    saved: SavedOfJoin | None = JOIN.saved_by(node, "cpu")
    if saved is None or len(saved.maps) > 1 or saved.normalizations[0] == NONE:
        return None
    return partial(once_more, saved._replace(maps=[saved.maps[0].detach()]))


def recomputed(y: Tensor) -> AbstractContextManager[Any]:
    """Operations in this context that would keep y for their backward pass compute it again there.

    Costs one pass (y from x) and saves the map. For y from the C++ kernels' BN → activation → SE,
    without SE too, and BN → ReLU; for any other one, and where somebody else already decides what
    is kept (torch.utils.checkpoint, torch.autograd.graph.save_on_cpu), nothing changes.
    """
    autograd: Any = torch._C._autograd
    if (
        not autograd._saved_tensors_hooks_is_enabled()
        or autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return nullcontext()
    again = _of_tail(y.grad_fn) or _of_join(y.grad_fn)
    if again is None:
        return nullcontext()
    address, shape = y.data_ptr(), y.shape

    def pack(t: Tensor) -> Tensor | Callable[[], Tensor]:
        return again if t.data_ptr() == address and t.shape == shape else t

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
