"""The forms in which a network's SE blocks can be laid out for a runtime.

- `plain`: as the network computes, mean of the block's map, scale, addition.
- `squeeze_first`: the graph of `senet.optimize`, of anybody's network: batch norms folded, and the
  squeeze before the last convolution of the branch (docs/algebra.md, section 3) where it commutes.
- `expanded`: the same, the squeeze as AveragePool, layers as 1×1 convolutions and the gates
  enlarged to the map's size, so that everything has a blocked (NCHWc) form in ONNX Runtime and no
  layout is changed around the scale. Needs fixed shapes.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, fx, nn

from senet.inference.modules import FusedConv, Pointwise, SqueezeGate, finish
from senet.inference.optimization import OptimizedModel, optimize
from senet.inference.part import OptimizedPart
from senet.inference.rewrites.convolutions import padding_to_same_size
from senet.ops.activations import LINEAR

Form = Literal["plain", "squeeze_first", "expanded"]
FORMS: tuple[Form, ...] = get_args(Form)


class _ExpandedGate(nn.Module):
    """The gates of a `SqueezeGate` as a map (N,C,1,1), by 1×1 convolutions."""

    def __init__(self, gate: SqueezeGate) -> None:
        super().__init__()
        self.inner = gate

    def forward(self, u: Tensor) -> Tensor:
        gate = self.inner
        assert gate.geometry is None
        # Not adaptive_avg_pool2d, which becomes a ReduceMean.
        height, width = u.shape[2:]
        squeezed = F.avg_pool2d(u, (height, width))
        hidden = gate.activation(F.conv2d(squeezed, gate.weight1[:, :, None, None], gate.bias1))
        return gate.gate(F.conv2d(hidden, gate.weight2[:, :, None, None], gate.bias2))


class _Pool(nn.Module):
    """The mean over all positions of a map by a window of its size."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return F.avg_pool2d(x, (height, width))


class _ExpandedScale(nn.Module):
    """A module of an optimized network whose gates come as a map (N,C,1,1)."""

    def __init__(self, scaled: FusedConv | Pointwise) -> None:
        super().__init__()
        self.activation, self.slopes = scaled.activation, scaled.slopes
        self.inner = copy.deepcopy(scaled)
        self.inner.activation, self.inner.slopes = LINEAR, None

    def forward(self, x: Tensor, gates: Tensor, shortcut: Tensor | None = None) -> Tensor:
        y = self.inner(x)
        y = y * F.interpolate(gates, size=y.shape[2:], mode="nearest")
        return finish(y, None, shortcut, self.activation, self.slopes)


def _expand(graph: fx.GraphModule) -> int:
    """Replace the squeezes and gates of a graph, and what they scale; how many gates there were."""
    count = 0
    for node in list(graph.graph.nodes):
        scaled = _called(graph, node)
        if not isinstance(scaled, FusedConv | Pointwise) or len(node.args) < 2:
            continue
        gates = node.args[1]
        gate = _called(graph, gates)
        if not isinstance(gates, fx.Node) or not (
            _expand_gate(graph, gates, gate)
            if isinstance(gate, SqueezeGate)
            else _pool(graph, gates)
        ):
            continue
        graph.add_submodule(str(node.target), _ExpandedScale(scaled))
        count += 1
    graph.recompile()
    return count


def _called(graph: fx.GraphModule, node: Any) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph.get_submodule(str(node.target))
    return None


def _expand_gate(graph: fx.GraphModule, node: fx.Node, gate: SqueezeGate) -> bool:
    """Let a `SqueezeGate` give a map (N,C,1,1), if it can."""
    if gate.geometry is not None:
        return False
    graph.add_submodule(str(node.target), _ExpandedGate(gate))
    return True


def _pool(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Let the squeeze of gates (N,C,1,1), a mean before 1×1 convolutions, be a window."""
    while isinstance(_called(graph, node), FusedConv | Pointwise) and len(node.args) == 1:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    if not isinstance(_called(graph, node), nn.AdaptiveAvgPool2d | _Pool):
        return False
    graph.add_submodule(str(node.target), _Pool())
    return True


def _with_known_padding(model: nn.Module) -> nn.Module:
    """The model with `FusedConv` for classes that pad to the same size by arithmetic on sizes.

    With free sizes that arithmetic takes minutes to export, and a runtime's time.
    """
    for name, module in list(model.named_modules()):
        if name and isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
            known = padding_to_same_size(module) if module.padding_mode == "zeros" else None
            if known is not None:
                model.set_submodule(name, known)
    return model


def in_form(model: nn.Module, example: Tensor, form: Form) -> nn.Module | None:
    """A copy of the model in a form, in evaluation mode; None where it has no such form."""
    if form == "plain":
        return _with_known_padding(copy.deepcopy(model).eval())
    own = isinstance(model, OptimizedModel)
    optimized = copy.deepcopy(model) if own else optimize(model, example, measure=False)
    parts = [part for part in optimized.modules() if isinstance(part, OptimizedPart)]
    if form == "expanded" and sum(_expand(part.graph_module) for part in parts) == 0:
        return None
    return optimized
