"""A rewritten graph that runs on the kernels where it can."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet import kernels
from senet.errors import UserError
from senet.inference.plans import Plans
from senet.inference.replay import Replays
from senet.nn.hooks import give_forward_hooks

# Held while a network's `Plans` are made, which threads that call it at the same time share.
_MAKING = threading.Lock()


class OptimizedPart(nn.Module):
    """A rewritten graph that runs on the C++ kernels where it can and in PyTorch elsewhere.

    The kernels take one float32 tensor, (N,C,H,W) or (N,C,L), on the CPU outside of autograd; one
    tensor on a GPU is run as a CUDA graph (see `senet.inference.replay`); anything else, and any
    graph capture (torch.compile, torch.export, a trace), gets the same graph in PyTorch. Any number
    of threads may call it at the same time. Weights that were edited since they were packed are
    packed anew (see `senet.inference.weights.Watch`).

    Args:
        graph: the rewritten graph.
        rank: dimensions of the tensors that the kernels take: 4, or 3 in networks of one spatial
            dimension.
    """

    def __init__(self, graph: fx.GraphModule, rank: int = 4) -> None:
        super().__init__()
        self.graph_module = graph
        self.rank = rank
        self._plans: Plans | Replays | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without programs and packed weights: they are made anew where they are needed."""
        return {**self.__dict__, "_plans": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedPart:
        graph = copy.deepcopy(self.graph_module, memo)
        made = OptimizedPart(graph, self.rank).train(self.training)
        give_forward_hooks(self, made)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_layer(self, name, value, "graph_module")
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> OptimizedPart:
        self.repack()  # weights move or change their type: what was packed of them may go
        super()._apply(*args, **kwargs)
        return self

    def repack(self) -> None:
        """Let the next call pack the weights anew."""
        self._plans = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the original model returns for the same inputs."""
        if len(inputs) == 1 and not named and (kind := self._taker(inputs[0])) is not None:
            plans = self._current_plans(kind)
            if not (torch.is_grad_enabled() and plans.watch.wants_gradients()):
                return plans.run(inputs[0])
        return self.graph_module(*inputs, **named)

    def plans(self, *inputs: Any, **named: Any) -> Plans | None:
        """The programs that these inputs run on; None where PyTorch runs the graph."""
        kernels_take_them = len(inputs) == 1 and not named and self._taker(inputs[0]) is Plans
        plans = self._current_plans(Plans) if kernels_take_them else None
        return plans if isinstance(plans, Plans) else None

    def _current_plans(self, kind: type[Plans | Replays]) -> Plans | Replays:
        plans = self._plans
        if plans is None or plans.watch.changed():
            with _MAKING:
                if self._plans is plans or self._plans is None:  # else another thread was faster
                    self._plans = kind(self.graph_module)
                plans = self._plans
        return plans

    def _taker(self, x: Any) -> type[Plans | Replays] | None:
        """What runs the graph for this input; None for PyTorch."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
            return None
        if x.numel() == 0 or (torch.is_grad_enabled() and x.requires_grad):
            return None
        weight = next(self.graph_module.parameters(), x)
        if weight.device != x.device:
            return None
        if x.device.type == "cuda":
            return None if torch.cuda.is_current_stream_capturing() else Replays
        if x.device.type != "cpu" or x.ndim != self.rank or kernels.MISSING:
            return None
        return Plans if x.dtype == weight.dtype == torch.float32 else None


def refuse_layer(module: nn.Module, name: str, value: object, own: str) -> None:
    """Refuse a layer or parameter set where the optimized network would not use it.

    Raises:
        UserError: it is one.
    """
    if isinstance(value, nn.Module | nn.Parameter) and name != own:
        raise UserError(
            f"an optimized network has no {name} to replace (its layers are rewritten): set it in "
            "the original network and optimize that again"
        )
