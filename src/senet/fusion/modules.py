"""Modules that a tail can be made of: which batch norms, activations and SE blocks are known.

What a module computes is known by its class where that is PyTorch's own, and by the values it gives
for an activation of any other class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.anatomy.excitations import Excitation
from senet.anatomy.gate_function import activation_after
from senet.anatomy.graph import Node
from senet.nn.block import GATES
from senet.nn.sync_bn import SyncBatchNorm
from senet.ops import BRANCH_ACTIVATIONS, HIDDEN_ACTIVATIONS, Activation
from senet.ops.convolution import packed

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SyncBatchNorm)
_LINEAR = Activation("linear")
_CLASSES: dict[type, Activation] = {
    nn.Identity: _LINEAR,
    nn.ReLU: Activation("relu"),
    nn.ReLU6: Activation("relu6"),
    nn.SiLU: Activation("silu"),
    nn.Hardswish: Activation("hardswish"),
}
_FUNCTIONS: dict[Any, Activation] = {
    F.relu: Activation("relu"),
    F.relu_: Activation("relu"),
    torch.relu: Activation("relu"),
    torch.relu_: Activation("relu"),
    "relu": Activation("relu"),
    "relu_": Activation("relu"),
    F.relu6: Activation("relu6"),
    F.silu: Activation("silu"),
    F.hardswish: Activation("hardswish"),
}
_FASTER = (5, 7)  # sides of kernels at which PyTorch's gradient of the weights is slow
_GRID = torch.linspace(-8, 8, 161)
_MEANS = ("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_SHAPES = ("reshape", "same", "expand")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Where the classes live whose instances do the same in training, beside the layers.
_STEADY = (
    *("torch.nn.modules.activation", "torch.nn.modules.pooling", "torch.nn.modules.flatten"),
    *("torch.nn.modules.linear", "timm.layers.activations", "timm.layers.activations_me"),
    "senet.nn.block",
)


def normalizes_and_activates(module: nn.Module | None) -> bool:
    """Whether this is timm's batch norm with an activation, and nothing random between them."""
    cls = type(module)
    if (cls.__module__, cls.__name__) != ("timm.layers.norm_act", "BatchNormAct2d"):
        return False
    return isinstance(module, nn.BatchNorm2d) and type(module.drop) is nn.Identity


def own_activation(module: nn.Module | None) -> Activation | None:
    """The activation within a batch norm: none but in timm's; None for one that is not known."""
    return activation_of(module.act) if normalizes_and_activates(module) else _LINEAR  # type: ignore[union-attr, arg-type]  # it is that class


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether `senet.ops.depthwise` computes this, and faster: docs/fusion.md."""
    if type(module) is not nn.Conv2d or module.bias is not None or module.padding_mode != "zeros":
        return False
    square = len({*module.kernel_size}) == len({*module.stride}) == len({*module.padding}) == 1
    alone = module.groups == module.in_channels == module.out_channels
    whole = alone and square and module.dilation == (1, 1)
    return whole and module.kernel_size[0] in _FASTER and isinstance(module.padding[0], int)


def is_three_by_three(module: nn.Module | None) -> bool:
    """Whether `senet.ops.convolution` may compute this faster, which its rule decides by shape."""
    return (
        type(module) is nn.Conv2d
        and module.bias is None
        and (module.kernel_size, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1))
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and packed(module.weight.shape, module.groups) > 0
    )


def is_norm(module: nn.Module | None) -> bool:
    """Whether the operator can take the place of this batch norm."""
    return type(module) in NORMS or normalizes_and_activates(module)


def activation_of(module: nn.Module | None) -> Activation | None:
    """The activation that a module computes, by its values; None for anything else."""
    if module is None:
        return None
    if type(module) in _CLASSES:
        return _CLASSES[type(module)]
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", module.negative_slope)
    where = type(module).__module__
    if where.startswith("torch.nn.modules") and type(module) is not nn.GELU:
        return None
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return None
    if next(module.children(), None) is not None or isinstance(module, NORMS):
        return None
    try:
        with torch.no_grad():
            found = [module(_GRID.clone().reshape(1, -1, 1, 1)) for _ in range(2)]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None  # takes something else than a map
    if not all(isinstance(t, Tensor) and t.shape == (1, 161, 1, 1) for t in found):
        return None
    for name in BRANCH_ACTIVATIONS[1:]:  # what does nothing now may drop paths in training
        expected = Activation(name, 0.01)(_GRID)
        if all(torch.allclose(t.flatten(), expected, atol=1e-6) for t in found):
            return Activation(name, 0.01)
    return None


def function_activation(target: Any, arguments: tuple[Any, ...], options: Any) -> Activation | None:
    """The activation that a call of a function or method is, from what it is given."""
    rest = {**dict(enumerate(arguments[1:])), **options}
    rest.pop("inplace", None)
    if target is F.leaky_relu:
        slope = rest.get("negative_slope", rest.get(0, 0.01))
        return Activation("leaky_relu", float(slope)) if isinstance(slope, float | int) else None
    if target is F.gelu:
        return Activation("gelu") if rest.get("approximate", "none") == "none" else None
    plain = all(value in (True, False) for value in rest.values())  # inplace by position
    return _FUNCTIONS.get(target) if plain else None


class Gate(NamedTuple):
    """What the operator needs to know of an SE block that is a module.

    Attributes:
        fc1, fc2: names of its layers within it.
        hidden_activation: one of `HIDDEN_ACTIVATIONS`.
        gate: one of `senet.ops.GATES`.
        inside: names of all modules within it, whose hooks have to be called.
    """

    fc1: str
    fc2: str
    hidden_activation: str
    gate: str
    inside: tuple[str, ...]


def gate_of(model: nn.Module, block: Excitation) -> Gate | str:
    """How the operator computes an SE block; the reason where it cannot."""
    module = block.module
    if module is None:
        return "its code is written inside of a larger module"
    if block.squeeze != "avg" or block.squeezed != block.scales or block.shift:
        shifted = " and shift" if block.shift else ""
        return f"squeeze {block.squeeze} of {block.squeezed}, scale{shifted} of {block.scales}"
    if any(node.name not in _MEANS for seen in block.occurrences for node in seen.squeezes):
        return f"the squeeze {block.occurrences[0].squeezes[-1].name}"
    nodes = block.occurrences[0].program
    layers = [node for node in nodes if node.kind in ("conv", "linear")]
    if len(layers) != 2:
        return f"{len(layers)} layers, the operator has two"
    if block.gate not in GATES:
        return f"the gate {block.gate}"
    hidden = _hidden_activation(layers[0], layers[1])
    if hidden not in HIDDEN_ACTIVATIONS:
        return f"the hidden activation {hidden}"
    prefix = f"{block.name}." if block.name else ""
    names = [next((c.name for c in reversed(node.calls)), "") for node in layers]
    for name in names:
        layer = model.get_submodule(name)
        if not name.startswith(prefix) or not _is_pointwise(layer):
            return f"the layer {name} ({type(layer).__name__})"
    for name, child in module.named_modules():
        known = prefix + name in names or type(child).__module__ in _STEADY
        if name and not known and next(child.children(), None) is None:
            return f"{type(child).__name__} inside"
    fc1, fc2 = (name.removeprefix(prefix) for name in names)
    inside = tuple(name for name, _ in module.named_modules() if name)
    return Gate(fc1, fc2, hidden, block.gate, inside)


def _hidden_activation(first: Node, last: Node) -> str:
    """Name of the function between two layers."""
    node = first
    while len(node.users) == 1 and node.users[0].kind in _SHAPES:
        node = node.users[0]
    found = activation_after(node)
    if found is None:
        return "none"
    name, node = found
    while len(node.users) == 1 and node.users[0].kind in _SHAPES:
        node = node.users[0]
    return name if node.users == [last] else f"{name} and more"


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a plain matrix product for vectors."""
    if type(layer) not in _LAYERS:
        return False
    if isinstance(layer, nn.Linear):
        return True
    conv: Any = layer
    once = (*conv.kernel_size, *conv.stride, conv.groups)
    return set(once) == {1} and set(conv.padding) <= {0}
