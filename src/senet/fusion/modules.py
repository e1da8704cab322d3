"""Modules that a tail can be made of: which batch norms, activations and SE blocks are known.

What a module computes is known by its class where that is PyTorch's own, and by the values it gives
for an activation of any other class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.anatomy.excitations import Excitation
from senet.anatomy.gate_function import activation_after, gate_chain
from senet.anatomy.graph import Node, Trace
from senet.anatomy.occurrences import Occurrence, container
from senet.anatomy.recording import record
from senet.fusion.state import ModuleState, RandomState, watched
from senet.fusion.steps import is_sharded, like, steps
from senet.nn.block import GATES, SqueezeExcitation
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
# Two images of three channels, neighbours far from each other; no value where a slope changes.
_PROBE = torch.cat((torch.linspace(-8, 8, 164) + 0.013, torch.tensor([-1e4, -100.0, 100.0, 1e4])))
_PROBE = _PROBE[torch.randperm(168, generator=torch.Generator().manual_seed(0))].view(2, 3, 4, 7)
_MEANS = ("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_SHAPES = ("reshape", "same", "expand")
_CUT = ("detach", "data")  # the gradient
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
    if type(module) is nn.LeakyReLU:
        return Activation("leaky_relu", module.negative_slope)
    where = type(module).__module__
    if where.startswith("torch.nn.modules") and type(module) is not nn.GELU:
        return None
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return None
    if next(module.children(), None) is not None or isinstance(module, NORMS):
        return None
    found = _probed(module)
    for name in BRANCH_ACTIVATIONS[1:] if found else ():  # what does nothing now may drop paths
        expected = _with_slope(Activation(name, 0.01).__call__)
        if all(map(partial(_close, expected), found)):
            return Activation(name, 0.01)
    return None


def _probed(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Values and slopes in evaluation and in training; nothing where it takes no map or is random.

    It is as before afterwards, and so are random numbers.
    """
    state, numbers, training = ModuleState(module), RandomState(), module.training
    try:
        found = []
        for module.training in (False, True):
            found.append(_with_slope(module))
        return [] if state.changed() or numbers.moved() else found
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return []  # takes something else than a map, or gives something else
    finally:
        module.training = training
        state.restore()
        numbers.restore()


def _with_slope(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = _PROBE.clone().requires_grad_()
        y = function(x.clone())
        (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def _close(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> bool:
    same = (a.shape == b.shape and a.dtype == b.dtype for a, b in zip(expected, found, strict=True))
    near = (torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))
    return all(same) and all(near)


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


def gate_of(model: nn.Module, block: Excitation, trace: Trace) -> Gate | str:
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
    weights = [p for name in names for p in model.get_submodule(name).parameters()]
    for seen in block.occurrences:
        if (why := _more_than_a_gate(seen, weights)) is not None:
            return why
    ours = isinstance(module, SqueezeExcitation)
    if not ours and (why := _otherwise_in_training(module, block.occurrences[0], trace)):
        return why
    fc1, fc2 = (name.removeprefix(prefix) for name in names)
    inside = tuple(name for name, _ in module.named_modules() if name)
    return Gate(fc1, fc2, hidden, block.gate, inside)


def _more_than_a_gate(seen: Occurrence, weights: list[nn.Parameter]) -> str | None:
    """What one run of a block did beside squeezing its map, two layers and their functions."""
    if seen.map.positions != tuple(range(2, len(seen.map.shape))):
        return "its map is not (N,C,*)"
    if len(seen.squeezes) != 1:
        return "several squeezes"
    (squeeze,) = seen.squeezes
    if squeeze.name == "mean" and _dimensions(squeeze) != set(squeeze.sources[0].positions):
        return "it squeezes images too"
    if not _reaches(squeeze.sources[0], seen.map):
        return "it squeezes what it makes of the map"
    first, last = (node for node in seen.program if node.kind in ("conv", "linear"))
    if not _reaches(first.sources[0], squeeze):
        return "something between its squeeze and its first layer"
    if gate_chain(seen.factor)[0] is not last:
        return "something between its last layer and its gate"
    nodes = (*seen.program, squeeze, seen.product)
    if any(node.kind == "dropout" for node in nodes):
        return "dropout inside"
    if any(node.name in _CUT for node in nodes):
        return "a gradient is cut"
    own = {id(weight) for weight in weights}
    tensors = (n.tensor for node in nodes for n in node.inputs if n.tensor is not None)
    if any(id(tensor) not in own for tensor in tensors):
        return "a tensor beside those of its layers"
    channels = seen.map.shape[1]
    sizes = first.sources[0].shape, last.shape
    return None if all(channels in shape for shape in sizes) else "its layers have other sizes"


def _dimensions(mean: Node) -> set[int]:
    """What a mean is taken over."""
    given = mean.kwargs.get("dim", mean.args[1] if len(mean.args) > 1 else None)
    rank = len(mean.sources[0].shape)
    numbers = (given,) if isinstance(given, int) else tuple(given or range(rank))
    return {number % rank for number in numbers}


def _reaches(node: Node, origin: Node) -> bool:
    """Whether a tensor holds the numbers of another one, by image and channel in their places."""
    while node is not origin:
        if node.kind not in _SHAPES or node.name in _CUT or len(node.sources) != 1:
            # The map itself may have come by such a step.
            return any(node is n for n in _unmoved(origin))
        (before,) = node.sources
        kept = [size for size in before.shape if size != 1]
        if node.positions and node.shape[:2] != before.shape[:2]:
            return False
        if not node.positions and kept != [size for size in node.shape if size != 1]:
            return False
        node = before
    return True


def _unmoved(node: Node) -> list[Node]:
    """A node and those before it of which it is a copy."""
    found = [node]
    while found[-1].kind == "same" and len(found[-1].sources) == 1:
        found.append(found[-1].sources[0])
    return found


def _otherwise_in_training(module: nn.Module, seen: Occurrence, trace: Trace) -> str | None:
    """What a block does in training that it does not in evaluation; None for nothing."""
    call = container(seen)
    expected = steps(node for node in trace.nodes if node.within(call))
    if is_sharded(module):
        blank = {id(p): nn.Parameter(_zeros_like(p)) for p in module.parameters()}
        module = copy.deepcopy(module, blank)
    state, numbers = ModuleState(module), RandomState()
    held, real = vars(module).get("forward"), module.forward
    noted: list[str] = []

    def watching(*args: Any, **kwargs: Any) -> Any:
        with watched() as found:
            result = real(*args, **kwargs)
        noted.extend(found)
        return result

    module.__dict__["forward"] = watching
    try:
        run = record(module, (like(call.inputs[0], module),), training=True)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"it cannot be run in training ({str(error).split(chr(10), 1)[0]})"
    finally:
        del module.__dict__["forward"]
        if held is not None:
            module.__dict__["forward"] = held
        changed, moved = state.changed(), numbers.moved()
        state.restore()
        numbers.restore()
    if moved or steps(run.nodes) != expected:
        return "in training it computes something else"
    if noted or changed:
        return f"it uses {noted[0]}" if noted else f"it sets {changed}"
    return None


def _zeros_like(parameter: nn.Parameter) -> Tensor:
    """In one part, of one that lies in several."""
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


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
