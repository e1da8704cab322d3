"""Timing a network beside its original, and what of its time runs outside of the kernels."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.inference.modules import FusedConv, Pointwise
from senet.inference.part import OptimizedPart
from senet.inference.steps import TorchStep

_ROUNDS, _FEWEST = 7, 3
_SECONDS = 2.0  # after that, the fewest rounds are enough
# Threads of the run before may still spin and take a core from the next one.
_PAUSE = 0.02
_IN_PYTORCH, _THE_REST = "the rewritten graph, in PyTorch", "modules that are not optimized"
clock = time.perf_counter


def medians(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each run, in turns after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    start = clock()
    for done in range(_ROUNDS):
        if done >= _FEWEST and clock() - start > _SECONDS:
            break
        for name, run in runs.items():
            time.sleep(_PAUSE)
            began = clock()
            run()
            times[name].append(1e3 * (clock() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def called(network: Callable[..., object], *inputs: Tensor) -> Callable[[], object]:
    """A call of a network on images, which ends when its work is done."""

    def once() -> object:
        with torch.no_grad():
            result = network(*inputs)
        if any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
            torch.cuda.synchronize()
        return result

    return once


@contextmanager
def left_to_pytorch(network: nn.Module) -> Iterator[Counter[str]]:
    """Count in a run of a network which nodes of its optimized parts run outside of the kernels.

    Args:
        network: an optimized network, or one with optimized parts.

    Yields:
        By operation, how many of the network's run so far.
    """
    found: Counter[str] = Counter()

    def note(part: OptimizedPart, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        plans = part.plans(*args, **named)
        if plans is None:
            found[_IN_PYTORCH] += 1
        else:
            steps = [s for s in plans.program(args[0]).parts if isinstance(s, TorchStep)]
            found.update(_name(part.graph_module, step.node) for step in steps)

    with _before_each(_outermost(network), note):
        yield found


def _outermost(network: nn.Module) -> list[OptimizedPart]:
    """The optimized parts of a network that are in no other one."""
    parts = [part for part in network.modules() if isinstance(part, OptimizedPart)]
    inner = {m for part in parts for m in part.graph_module.modules()}
    return [part for part in parts if part not in inner]


@contextmanager
def _before_each(
    parts: list[OptimizedPart],
    called: Callable[[OptimizedPart, tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """Have something called with each part and its inputs before it runs."""
    handles = [part.register_forward_pre_hook(called, with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outside(network: nn.Module, x: Tensor) -> dict[str, float]:
    """By operation, the share of a network's time that runs outside of the kernels.

    Args:
        network: an optimized network, or one with optimized parts.
        x: images.

    Returns:
        Shares from 0 to 1, largest first.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    outermost, within = _outermost(network), 0.0

    def timed(part: OptimizedPart, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal within
        plans = part.plans(*args, **named)
        began = clock()
        if plans is None:
            called(partial(part.graph_module, **named), *args)()
            seconds[_IN_PYTORCH] += clock() - began
        else:
            for node, value in plans.program(args[0]).profile(args[0], clock).items():
                seconds[_name(part.graph_module, node)] += value
        within = sum(seconds.values())

    with torch.no_grad(), _before_each(outermost, timed):
        network(x)
    if outermost != [network]:
        with torch.no_grad():
            began = clock()
            network(x)
            seconds[_THE_REST] += max(clock() - began - within, 0.0)
    total = sum(seconds.values())
    shares = {name: value / total for name, value in seconds.items() if name and value > 0}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _name(graph: fx.GraphModule, node: fx.Node | None) -> str:
    """What the report calls a node that PyTorch runs; "" for the kernels."""
    if node is None:
        return ""
    match node.op:
        case "call_module":
            module = graph.get_submodule(str(node.target))
            if isinstance(module, FusedConv | Pointwise):
                what = "convolution" if isinstance(module, FusedConv) else "pass"
                ends = "prelu" if module.slopes is not None else module.activation.name
                return f"{what} with {ends}"
            return type(module).__name__
        case "get_attr":
            return "parameters"
        case _:
            return str(getattr(node.target, "__name__", node.target))
