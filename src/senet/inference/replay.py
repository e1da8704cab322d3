"""A network on a GPU as one launch: CUDA graphs, captured when an input's shape comes again."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from senet.inference.outputs import tensors
from senet.inference.weights import Watch
from senet.ops.choice import chosen

KEPT = 8  # graphs; each holds the activations of its input, which all of them share


class _Replay:
    """One captured run; its input and outputs lie where the graph has them."""

    def __init__(self, graph: fx.GraphModule, x: Tensor, pool: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            self.x.copy_(x)
            side = torch.cuda.Stream()  # where this thread makes what must not be made in a capture
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph(self.x)
            torch.cuda.current_stream().wait_stream(side)
            self.captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured, pool=pool, capture_error_mode="thread_local"):
                self.outputs = graph(self.x)
        copied = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(self.outputs))
        if copied != sum(1 for _ in tensors(self.outputs)):
            raise RuntimeError("it returns tensors in containers that PyTorch does not know")

    def run(self, x: Tensor) -> Any:
        self.x.copy_(x)
        self.captured.replay()
        return tree_map_only(Tensor, torch.clone, self.outputs)


class Replays:
    """CUDA graphs of one network, by input shape and whatever else decides what is launched.

    A shape runs kernel by kernel when it comes for the first time, is captured with the second call
    and replayed from then on: at small batches the launches take several times as long as the
    kernels. Weights are read where they lie, so edits in place are seen; `watch` tells of others.

    Args:
        graph: the rewritten graph, on a CUDA or ROCm device.

    Attributes:
        watch: tells whether the weights still lie where the captured kernels read them.
        replays: what was captured; None for what ran once, False for what cannot be captured.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.watch = Watch(graph)
        self.replays: OrderedDict[tuple[Any, ...], _Replay | bool | None] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def run(self, x: Tensor) -> Any:
        """The network's output for x, on a GPU."""
        key = (x.shape, x.stride(), x.dtype, x.device, *_settings())
        with self._lock, torch.cuda.device(x.device):
            replay = self._replay(key, x)
            if isinstance(replay, _Replay):
                stream = torch.cuda.current_stream()
                if self._done is not None:  # another stream may still read what is written now
                    stream.wait_event(self._done)
                found = replay.run(x)
                self._done = stream.record_event()
                return found
        return self.graph(x)

    def _replay(self, key: tuple[Any, ...], x: Tensor) -> _Replay | bool | None:
        known = key in self.replays
        found = self.replays.pop(key, None)
        if known and found is None:
            found = self._capture(x)
        self.replays[key] = found
        if len(self.replays) > KEPT:
            self.replays.popitem(last=False)
        return found

    def _capture(self, x: Tensor) -> _Replay | bool:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return _Replay(self.graph, x, self._pool)
        except RuntimeError as error:
            self._pool = None  # the one that was captured into cannot be used again
            warnings.warn(
                f"this network cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); "
                "it is launched kernel by kernel, which is slower for small batches",
                stacklevel=6,
            )
            return False


def _settings() -> tuple[object, ...]:
    """What beside the input decides which kernels run."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        chosen(),
    )
