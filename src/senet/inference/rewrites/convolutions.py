"""Convolutions in every clothing, as `FusedConv`: modules, functions, and with zeros padded before.

A class derived from nn.Conv2d that torch.fx cannot follow is known by what it computes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from senet.inference.modules import FusedConv
from senet.inference.rewrites.editor import Editor, plain
from senet.inference.rewrites.tracing import FAILURES

Pair = tuple[int, int]


def recognise(edit: Editor) -> None:
    """Make a `FusedConv` of each convolution."""
    for node in list(edit.graph.nodes):
        fused = _of_module(edit, node) or _of_function(edit, node)
        if fused is not None:
            edit.insert_in_place_of(node, fused, node.args[:1])
    for node in list(edit.graph.nodes):
        _take_in_padding(edit, node)
        _linear(edit, node)


def _of_module(edit: Editor, node: fx.Node) -> FusedConv | None:
    module = edit.called(node)
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or node.kwargs:
        return None
    if module.padding_mode != "zeros":
        return None
    if plain(module):
        batched = isinstance(module, nn.Conv2d) or len(edit.shape(node) or ()) == 3
        return FusedConv(module) if batched else None
    if not isinstance(module, nn.Conv2d):
        return None
    name = str(node.target)
    fused = padding_to_same_size(module) if name in edit.closed else None
    if fused is not None:
        del edit.closed[name]
    return fused


class _Watch(TorchFunctionMode):
    """Keeps weight and bias of the convolution that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.seen.append((given["weight"], given.get("bias")))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def padding_to_same_size(conv: nn.Conv2d) -> FusedConv | None:
    """A convolution that pads as TensorFlow's "same" does; None if it computes anything else.

    It is tried on images of several sizes; its weights may be computed of its parameters.
    """
    tried, watch = copy.deepcopy(conv).cpu().double(), _Watch()
    try:
        with watch:
            tried(torch.zeros(1, conv.in_channels, *conv.kernel_size, dtype=torch.float64))
    except FAILURES:  # it takes other images than a convolution of its kind
        return None
    if len(watch.seen) != 1:
        return None
    weight, bias = watch.seen[0]
    if weight.shape != conv.weight.shape:
        return None
    exact = _same(_convolution(weight, bias, conv.stride, 0, conv.dilation, conv.groups))
    largest = max(conv.kernel_size)
    generator = torch.Generator().manual_seed(0)
    for extra in range(max(conv.stride) + 1):
        sides = (largest + extra, largest + 2 * extra + 1)
        x = torch.rand(1, conv.in_channels, *sides, generator=generator, dtype=torch.float64)
        wanted, found = tried(x), exact(x)
        if wanted.shape != found.shape or not torch.allclose(wanted, found):
            return None
    return exact.to(conv.weight.device, conv.weight.dtype)


def _same(conv: nn.Conv2d) -> FusedConv:
    fused = FusedConv(conv)
    fused.same = True
    return fused


def _convolution(
    weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> nn.Conv2d:
    """A layer of these numbers."""
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        pair(stride),
        padding if isinstance(padding, str) else pair(padding),
        pair(dilation),
        groups,
        bias=bias is not None,
        device="meta",
    )
    conv.weight = nn.Parameter(weight, False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, False)
    return conv


def _of_function(edit: Editor, node: fx.Node) -> FusedConv | None:
    """Of F.conv2d with constant weights."""
    if node.op != "call_function" or edit.operation(node) != "conv2d" or not node.args:
        return None
    weight = edit.constant(edit.argument(node, 1, "weight"))
    bias = edit.argument(node, 2, "bias")
    offset = edit.constant(bias)
    if weight is None or weight.ndim != 4 or (bias is not None and offset is None):
        return None
    names = ("stride", "padding", "dilation", "groups")
    given = [
        edit.argument(node, 3 + i, name, d)
        for i, (name, d) in enumerate(zip(names, (1, 0, 1, 1), strict=True))
    ]
    if any(isinstance(leaf, fx.Node) for value in given for leaf in _leaves(value)):
        return None
    return FusedConv(_convolution(weight, offset, *given))


def _linear(edit: Editor, node: fx.Node) -> None:
    """Make a layer of a call of F.linear with constant weights."""
    if node.op != "call_function" or edit.operation(node) != "linear" or not node.args:
        return
    weight = edit.constant(edit.argument(node, 1, "weight"))
    given = edit.argument(node, 2, "bias")
    bias = edit.constant(given)
    if weight is None or weight.ndim != 2 or (given is not None and bias is None):
        return
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, False)
    if bias is not None:
        made.bias = nn.Parameter(bias, False)
    edit.insert_in_place_of(node, made, node.args[:1])


def _leaves(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def pair(value: Any) -> Pair:
    """A number, or two in any sequence, as two."""
    both = _leaves(value)
    return (int(both[0]), int(both[-1]))


def _take_in_padding(edit: Editor, node: fx.Node) -> None:
    """Zeros that are padded before a convolution alone become its own."""
    module = edit.called(node)
    source = node.args[0] if node.args else None
    if not isinstance(module, FusedConv) or module.same or not isinstance(source, fx.Node):
        return
    zeros = _zeros(edit, source)
    if zeros is None or len(zeros) > 2 * module.dims or not edit.single_use(source):
        return
    left, right, top, bottom = (*zeros, 0, 0)[:4]
    module.pad((top, left), (bottom, right))
    edit.say(node, "zeros padded by the convolution itself")
    inner = source.args[0]
    assert isinstance(inner, fx.Node)
    edit.replace(source, inner)


def _zeros(edit: Editor, node: fx.Node) -> tuple[int, ...] | None:
    """How many zeros a node pads to the left and right, and to the top and bottom, of a map."""
    module = edit.called(node)
    sides: Any = None
    layers = (nn.ZeroPad1d, nn.ConstantPad1d, nn.ZeroPad2d, nn.ConstantPad2d)
    if type(module) in layers and getattr(module, "value", 0) == 0:
        sides = module.padding  # type: ignore[union-attr]
    elif edit.operation(node) == "pad":
        mode, value = edit.argument(node, 2, "mode", "constant"), edit.argument(node, 3, "value")
        if mode == "constant" and value in (None, 0):
            sides = edit.argument(node, 1, "pad")
    if not isinstance(sides, list | tuple) or len(sides) not in (2, 4):
        return None
    known = all(isinstance(side, int) and side >= 0 for side in sides)
    return tuple(sides) if known else None
