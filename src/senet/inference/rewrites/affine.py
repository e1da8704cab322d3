"""Batch norms in every clothing: one scale and offset a channel, folded into what is before.

A batch norm with running statistics is a·x + b (docs/algebra.md), whether it is a module, a call
of F.batch_norm, or a product and a sum with constants (frozen batch norm).
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from senet.inference.modules import FusedConv, Pointwise, batch_norm_affine, constant
from senet.inference.rewrites.editor import Editor, plain

_SUMS, _PRODUCTS = ("add", "sub"), ("mul", "multiply", "div")


def norms(edit: Editor) -> None:
    """Fold batch norms, and products and sums with constants of one number a channel."""
    for node in list(edit.graph.nodes):
        found = _norm(edit, node)
        what = "batch norm"
        if found is None:
            found, what = _with_constant(edit, node), "constants"
        if found is not None:
            _apply(edit, node, found, what)


def factors(edit: Editor) -> None:
    """Fold products with a number into the module before, or the convolutions behind."""
    for node in list(edit.graph.nodes):
        found = _factor(edit, node)
        if found is None:
            continue
        source, factor = found
        module = edit.takes_more(source)
        if module is not None and len(source.args) == 1:
            module.multiply(factor)
            edit.replace(node, source)
        elif _into_users(edit, node, factor):
            edit.replace(node, source)
        elif len(edit.shape(node) or ()) == edit.dims + 2:
            made = Pointwise()
            made.multiply(factor)
            edit.insert_in_place_of(node, made, (source,))


def _factor(edit: Editor, node: fx.Node) -> tuple[fx.Node, float] | None:
    """What a node multiplies by which number."""
    name = edit.operation(node)
    if name not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if name != "div" and isinstance(a, int | float):
        a, b = b, a
    if not isinstance(a, fx.Node) or not isinstance(b, int | float) or not edit.in_floats(node, a):
        return None
    return a, float(1 / b if name == "div" else b)


def _into_users(edit: Editor, node: fx.Node, factor: float) -> bool:
    """Let the convolutions that alone read a node multiply their inputs."""
    convolutions = [edit.called(user) for user in node.users]
    for user, module in zip(node.users, convolutions, strict=True):
        if not isinstance(module, FusedConv) or user.args != (node,):
            return False
    for module in convolutions:
        assert isinstance(module, FusedConv)
        module.weight.mul_(factor)
    return bool(convolutions)


class _Affine(NamedTuple):
    """a·x + b: the node x, a and b (C,) in float64, and a tensor of the model's type."""

    source: Any
    scale: Tensor
    offset: Tensor
    like: Tensor


def _norm(edit: Editor, node: fx.Node) -> _Affine | None:
    """What a batch norm computes."""
    if not node.args:
        return None
    module = edit.called(node)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        dimensions = len(edit.shape(node) or ()) or 4
        wanted = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
        if not plain(module) or module.running_mean is None:
            return None
        if not any(isinstance(module, kind) and dimensions in wanted[kind] for kind in wanted):
            return None
        scale, offset = batch_norm_affine(module)
        return _Affine(node.args[0], scale, offset, module.running_mean)
    if edit.operation(node) != "batch_norm" or node.op != "call_function":
        return None
    names = ("running_mean", "running_var", "weight", "bias")
    # torch.batch_norm has them in another order.
    places = (1, 2, 3, 4) if node.target is F.batch_norm else (3, 4, 1, 2)
    given = [edit.argument(node, *each) for each in zip(places, names, strict=True)]
    numbers = [edit.constant(value) for value in given]
    if any(
        value is not None and number is None for value, number in zip(given, numbers, strict=True)
    ):
        return None
    mean, var, weight, bias = numbers
    training = edit.argument(node, 5, "training", False)
    eps = edit.argument(node, 7, "eps", 1e-5)
    if mean is None or var is None or training is not False or not isinstance(eps, float):
        return None
    shape = edit.shape(node)
    if shape is None or not 2 <= len(shape) <= 5:
        return None
    scale = torch.rsqrt(var.double() + eps)
    scale = scale if weight is None else scale * weight.double()
    offset = -mean.double() * scale
    offset = offset if bias is None else offset + bias.double()
    return _Affine(node.args[0], scale, offset, mean)


def _with_constant(edit: Editor, node: fx.Node) -> _Affine | None:
    """What a product or sum with one constant number a channel computes."""
    name = edit.operation(node)
    if name not in (*_SUMS, *_PRODUCTS) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    swapped = edit.constant(a) is not None
    if swapped:
        a, b = b, a
    number, shape = edit.constant(b), edit.shape(a)
    if number is None or shape is None or edit.shape(node) != shape:
        return None
    if not edit.in_floats(node, a):
        return None
    if len(shape) != edit.dims + 2 or edit.dims > 2:
        return None
    C, ones = shape[1], (1,) * edit.dims
    each = tuple(number.shape[-1 - edit.dims :]) == (C, *ones) and number.numel() == C
    if not each and number.numel() != 1:
        return None
    values = number.detach().flatten().double().expand(C)
    one, zero = torch.ones_like(values), torch.zeros_like(values)
    match name:
        case "add":
            return _Affine(a, one, values, number)
        case "sub":
            sign = -one if swapped else one
            return _Affine(a, sign, values if swapped else -values, number)
        case "div":
            return None if swapped else _Affine(a, 1 / values, zero, number)
        case _:
            return _Affine(a, values, zero, number)


def _apply(edit: Editor, node: fx.Node, found: _Affine, what: str) -> None:
    source, scale, offset, like = found
    module = edit.takes_more(source)
    before = edit.called(source)
    if module is not None and len(source.args) == 1:
        if isinstance(module, FusedConv):
            module.take_in(scale, offset)
            into = "convolution"
        else:
            module.take_in(scale, offset, like)
            into = "pass before"
        edit.say(source, f"{what} {edit.name_of(node)} folded into the {into}")
        edit.replace(node, source)
    elif isinstance(before, nn.Conv3d) and plain(before) and edit.single_use(source):
        new = edit.insert_in_place_of(source, _folded(before, scale, offset), source.args)
        edit.say(new, f"{what} {edit.name_of(node)} folded into the convolution")
        edit.replace(node, new)
    elif _is_layer(edit, source) and edit.single_use(source):
        assert isinstance(before, nn.Linear)
        new = edit.insert_in_place_of(source, _scaled(before, scale, offset), source.args)
        edit.say(new, f"{what} {edit.name_of(node)} folded into the layer")
        edit.replace(node, new)
    else:
        made = Pointwise()
        made.take_in(scale, offset, like)
        new = edit.insert(made, node, (source,), edit.name_of(node))
        edit.say(new, f"{what} as one scale and offset")
        edit.replace(node, new)


def _is_layer(edit: Editor, node: Any) -> bool:
    """Whether a node is a fully connected layer of vectors."""
    module = edit.called(node)
    return isinstance(module, nn.Linear) and plain(module) and len(edit.shape(node) or ()) == 2


@torch.no_grad()
def _folded(conv: nn.Conv3d, scale: Tensor, offset: Tensor) -> nn.Conv3d:
    """A convolution of three dimensions with a scale and an offset behind it; both (D,)."""
    made = copy.copy(conv)
    made._parameters = dict(conv._parameters)
    weight = conv.weight
    bias = 0 if conv.bias is None else conv.bias.double()
    made.weight = constant(weight.double() * scale.view(-1, 1, 1, 1, 1), weight)
    made.bias = constant(bias * scale + offset, weight)
    return made


@torch.no_grad()
def _scaled(linear: nn.Linear, scale: Tensor, offset: Tensor) -> nn.Linear:
    """A fully connected layer with a scale and an offset behind it; both (D,)."""
    made = nn.Linear(linear.in_features, linear.out_features, device="meta")
    weight = linear.weight
    bias = 0 if linear.bias is None else linear.bias.double()
    made.weight = nn.Parameter((weight.double() * scale[:, None]).to(weight), False)
    made.bias = nn.Parameter((bias * scale + offset).to(weight), False)
    return made
