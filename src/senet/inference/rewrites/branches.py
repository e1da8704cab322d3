"""Parallel convolutions of one map, whose results are added, as one convolution.

A sum of convolutions is a convolution: smaller kernels are smaller only by zeros around them, and a
map that is merely scaled is a 1×1 convolution with a diagonal weight (arXiv 2101.03697).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from senet.inference.modules import FusedConv, Pointwise, constant, ends_openly
from senet.inference.rewrites.editor import Editor


def merge(edit: Editor) -> None:
    """Merge the summands of each addition that allow it."""
    for node in list(edit.graph.nodes):
        operation = edit.operation(node)
        if operation not in ("add", "sub") or len(node.args) != 2 or node.kwargs:
            continue
        sign = 1 if operation == "add" else -1
        for (wide, a), (other, b) in itertools.permutations(zip(node.args, (1, sign), strict=True)):
            if not isinstance(wide, fx.Node) or not isinstance(other, fx.Node) or wide is other:
                continue
            if _merged(edit, wide, a, other, b):
                edit.say(wide, f"{edit.name_of(other)} added to its weights")
                edit.replace(node, wide)
                break


def _merged(edit: Editor, wide: fx.Node, a: int, other: fx.Node, b: int) -> bool:
    """Let the convolution `wide` compute a·wide + b·other, if that is possible."""
    conv, small = edit.called(wide), edit.called(other)
    if not isinstance(conv, FusedConv) or not isinstance(small, FusedConv | Pointwise):
        return False
    alone = len(wide.args) == len(other.args) == 1 and wide.args == other.args
    if not alone or not all(ends_openly(m) for m in (conv, small)):
        return False
    if not edit.single_use(wide) or not edit.single_use(other):
        return False
    found = _embedded(conv, small)
    if found is None:
        return False
    weight, bias = found
    conv.weight = constant(a * conv.weight.double() + b * weight, conv.weight)
    conv.bias = constant(a * conv.bias.double() + b * bias, conv.bias)
    return True


def _embedded(conv: FusedConv, small: FusedConv | Pointwise) -> tuple[Tensor, Tensor] | None:
    """Weight and bias with which `conv` would compute what `small` does."""
    padding, stride, groups = (0, 0), (1, 1), conv.groups
    each = conv.weight.shape[1]
    if isinstance(small, FusedConv):
        if small.weight.shape[:2] != conv.weight.shape[:2]:  # of one input: in as many groups
            return None
        if small.same or small.padding != small.behind or set(small.dilation) != {1}:
            return None
        weight, bias = small.weight.double(), small.bias.double()
        padding, stride = small.padding, small.stride
    else:
        if small.scale is None or small.offset is None or len(conv.weight) != each * groups:
            return None
        factor, bias = small.scale.double() * small.factor, small.offset.double() * small.factor
        if len(factor) != len(conv.weight):
            return None
        own = torch.arange(len(factor), device=factor.device) % each
        weight = torch.zeros(len(factor), each, 1, 1, dtype=torch.float64, device=factor.device)
        weight[torch.arange(len(factor)), own, 0, 0] = factor
    if (
        conv.same
        or conv.padding != conv.behind
        or set(conv.dilation) != {1}
        or conv.stride != stride
    ):
        return None
    borders = []
    for axis in (1, 0):
        room = conv.weight.shape[2 + axis] - weight.shape[2 + axis]
        before = conv.padding[axis] - padding[axis]
        if room < 0 or room != 2 * before:
            return None
        borders += [before, before]
    return F.pad(weight, borders), bias
