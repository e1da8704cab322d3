"""What each node of a graph gives, without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


class _Keeping(fx.Interpreter):
    """Keeps what each node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[n] = result
        return result


class _Shapes(nn.Module):
    """Returns what each node of a graph gives."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> dict[fx.Node, Any]:
        interpreter = _Keeping(self.graph)
        interpreter.run(x)
        return interpreter.results


def traced_results(module: fx.GraphModule, x: Tensor) -> dict[fx.Node, Any]:
    """What each node gives for an input like x, as tensors without data."""
    shapes = _Shapes(module)
    held = dict(shapes.named_parameters()) | dict(shapes.named_buffers())
    empty = {name: tensor.to("meta") for name, tensor in held.items()}
    with torch.no_grad():
        return torch.func.functional_call(shapes, empty, (x.to("meta"),))
