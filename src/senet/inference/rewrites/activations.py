"""Activations by what they compute: those that the kernels know, written in whatever way.

Some scalar operations behind each other, which read nothing but one tensor and numbers, are
evaluated on a grid: x · relu6(x + 3) / 6 is the hard swish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.inference.modules import Across, FusedConv, Pointwise, ends_openly
from senet.inference.rewrites.editor import Editor, without_gradient
from senet.ops.activations import ACTIVATIONS, Activation

# Operations that map each number for itself.
SCALAR = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "hardswish", "mish", "gelu"),
    *("sigmoid", "hardsigmoid", "tanh", "hardtanh", "softplus", "logsigmoid", "softsign"),
    *("add", "sub", "rsub", "mul", "div", "neg", "clamp", "clip", "clamp_min", "clamp_max"),
    *("exp", "expm1", "log1p", "erf", "pow", "square", "sqrt", "rsqrt", "reciprocal", "abs"),
    *("multiply", "subtract", "divide", "true_divide", "threshold", "hardshrink", "softshrink"),
    "minimum",
    "maximum",
)
_LAYERS = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Hardswish, nn.Mish),
    *(nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Softplus, nn.LogSigmoid),
    *(nn.Softsign, nn.Threshold),
}
_LONGEST = 12  # operations of one activation
# Those that consist of straight lines with slopes and bounds that float32 knows.
_EXACT = ("relu", "relu6", "leaky_relu")
# Numbers of a network that came from ONNX were rounded to float32: 0.16666667 of a hard sigmoid.
_ROUNDING, _OF_ONE_NUMBER = 3e-7, 6e-8
_ROUNDED = ("hardswish", "hardsigmoid")
# What a difference of numbers near 1 leaves in float64, as 1 + tanh(x) does on the left.
_CANCELLED = 1e-14
_FAR = 1e3  # from here on all are straight lines, of float64 too
_NAMES = {"relu": "ReLU"}


def recognise(edit: Editor) -> None:
    """Make a `Pointwise` of each activation."""
    for node in list(edit.graph.nodes):
        if node in edit.graph.nodes:
            _prelu(edit, node)
    for node in list(edit.graph.nodes):
        if node in edit.graph.nodes and is_scalar(edit, node) and len(_inputs(edit, node)) == 1:
            _activation(edit, node)


def take_in(edit: Editor) -> None:
    """Let the module before an activation end in it."""
    for node in list(edit.graph.nodes):
        module = edit.called(node)
        if not isinstance(module, Pointwise) or len(node.args) != 1 or node.kwargs:
            continue
        if module.scale is not None or module.factor != 1:
            continue
        source = node.args[0]
        across = edit.called(source)
        if isinstance(across, Across) and ends_openly(across.conv) and edit.single_use(source):
            before: FusedConv | Pointwise | None = across.conv
        else:
            before = edit.takes_more(source)
        if before is None or not isinstance(source, fx.Node):
            continue
        before.activation, before.slopes = module.activation, module.slopes
        name = module.activation.name if module.slopes is None else "prelu"
        edit.say(source, f"{_NAMES.get(name, name)} in the same pass")
        edit.replace(node, source)


def is_scalar(edit: Editor, node: fx.Node) -> bool:
    """Whether a node maps each number of its inputs for itself."""
    module = edit.called(node)
    if module is not None:
        if isinstance(module, Pointwise):
            alone = module.scale is None and module.slopes is None
            return alone and len(node.args) == 1 and not node.kwargs
        return type(module) in _LAYERS and len(node.args) == 1
    return edit.operation(node) in SCALAR


def _inputs(edit: Editor, node: fx.Node) -> list[fx.Node]:
    """The nodes that a scalar operation reads, without numbers that are parameters."""
    return [n for n in node.all_input_nodes if not _is_number(edit, n)]


def _is_number(edit: Editor, node: fx.Node) -> bool:
    value = edit.constant(node)
    return value is not None and value.numel() == 1


def _prelu(edit: Editor, node: fx.Node) -> None:
    module = edit.called(node)
    slopes: Tensor | None = None
    if type(module) is nn.PReLU:
        slopes = module.weight
    elif edit.operation(node) == "prelu":
        slopes = edit.constant(edit.argument(node, 1, "weight"))
    if slopes is None or not node.args:
        return
    made = Pointwise()
    made.slopes = without_gradient(slopes)
    edit.insert_in_place_of(node, made, node.args[:1])


@dataclass(frozen=True)
class _Region:
    """Scalar operations that read nothing but one node.

    Attributes:
        entry: that node.
        steps: the operations, in order.
    """

    entry: fx.Node
    steps: tuple[fx.Node, ...]

    @property
    def closed(self) -> bool:
        """Whether nothing outside reads what any but the last operation gives."""
        inside = set(self.steps)
        return all(user in inside for step in self.steps[:-1] for user in step.users)


def _activation(edit: Editor, first: fx.Node) -> None:
    """Replace the longest activation that begins with this operation."""
    region = _Region(_inputs(edit, first)[0], (first,))
    best: tuple[_Region, Activation] | None = None
    while region is not None and len(region.steps) <= _LONGEST:
        if region.closed:
            known = _known(edit, region)
            best = best if known is None else (region, known)
        region = _grown(edit, region)  # type: ignore[assignment]
    if best is None:
        return
    region, known = best
    last = region.steps[-1]
    if edit.shape(last) != edit.shape(region.entry):
        return  # made larger by a number with dimensions
    if not edit.in_floats(last, region.entry):
        return
    module = edit.called(last)
    if isinstance(module, Pointwise) and len(region.steps) == 1:
        return
    made = Pointwise()
    made.activation = known
    edit.insert_in_place_of(last, made, (region.entry,))
    for step in reversed(region.steps[:-1]):
        edit.graph.erase_node(step)


def _grown(edit: Editor, region: _Region) -> _Region | None:
    """The region with the next operation that reads it, and what that reads besides."""
    inside = {region.entry, *region.steps}
    following = {user for step in region.steps for user in step.users if user not in inside}
    for user in sorted(following):
        more = _within(edit, user, inside)
        if more is not None:
            steps = sorted({*region.steps, *more})
            return _Region(region.entry, tuple(steps))
    return None


def _within(edit: Editor, node: fx.Node, inside: set[fx.Node]) -> list[fx.Node] | None:
    """The node with the operations that it needs beside those inside; None if it needs more."""
    if not is_scalar(edit, node):
        return None
    needed = [node]
    for source in _inputs(edit, node):
        if source in inside:
            continue
        if not is_scalar(edit, source) or not set(_inputs(edit, source)) <= inside:
            return None
        needed.append(source)
    return needed


def _grid() -> Tensor:
    """Numbers of all magnitudes, -0 and 0 among them: a bound of 1e-12 or of 500 is none of 0."""
    near = torch.linspace(-8, 8, 129, dtype=torch.float64)
    others = [1e-30, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 30, 300, 1e3, 1e4, 1e6, 1e9, 1e20, 1e30]
    magnitudes = torch.tensor(others, dtype=torch.float64)
    return torch.cat([near, magnitudes, -magnitudes])


def _tolerance(name: str, grid: Tensor, wanted: Tensor) -> Tensor:
    """How far an activation may be from what is wanted at each number of a grid.

    Far out, and at 0, it is as exact as float64; elsewhere other formulas, and numbers that were
    rounded to float32, may change it. Near 0 and on the left, where some are nearly 0 themselves,
    they change it in proportion.
    """
    exact = 1e-12 * wanted.abs()
    if name in _EXACT:
        return exact
    size = grid.abs()
    middle = (size > 1e-2) & (size < 10)
    anywhere = _ROUNDING * wanted.abs() + torch.where(middle, _ROUNDING, _CANCELLED)
    far = _OF_ONE_NUMBER * wanted.abs() if name in _ROUNDED else exact
    return torch.where(size >= _FAR, far, torch.where(size == 0, exact, anywhere))


@torch.no_grad()
def _known(edit: Editor, region: _Region) -> Activation | None:
    """The activation that a region computes, by its values."""
    grid = _grid()
    values: dict[fx.Node, Any] = {region.entry: grid}
    for step in region.steps:
        values[step] = _evaluated(edit, step, values)
    found = values[region.steps[-1]]
    if not isinstance(found, Tensor) or found.shape != grid.shape:
        return None
    at_one, far_left = float(found[grid == -1]), float(found[grid == -300])
    numbers: Mapping[str, float] = {"leaky_relu": -at_one, "elu": -far_left}
    for name, function in ACTIVATIONS.items():
        number = numbers.get(name, 0.0)
        possible = name != "linear" and number >= 0 and not (name == "leaky_relu" and number == 1)
        if not possible:
            continue
        wanted = function(grid, number)
        if bool(((found - wanted).abs() <= _tolerance(name, grid, wanted)).all()):
            return Activation(name, number)
    return None


def _evaluated(edit: Editor, step: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node].clone()
        number = edit.constant(node)
        assert number is not None
        return number.detach().double().reshape(())

    args, kwargs = fx.node.map_arg((step.args, step.kwargs), value)
    if step.op == "call_module":
        module = edit.called(step)
        assert module is not None
        return module(*args, **kwargs)
    if step.op == "call_method":
        return getattr(args[0], str(step.target))(*args[1:], **kwargs)
    assert callable(step.target)
    return step.target(*args, **kwargs)
