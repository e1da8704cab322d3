"""Each rewrite on small models: what it computes, and that it happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.marks import separate_passes
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from senet import kernels
from senet.inference import optimize
from senet.inference.modules import FusedConv, Pointwise, SqueezeGate
from senet.inference.program import Program
from senet.inference.rewrite import Rewriter
from senet.inference.rounding import difference
from senet.inference.steps import TorchStep
from senet.nn.block import SqueezeExcitation
from senet.ops.activations import Activation

SHAPES = [(2, 8, 12, 12), (3, 8, 9, 14)]  # the second is another batch and size than the example's


class Net(nn.Module):
    """Layers, and a function of them and the images."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """With statistics and biases as after training: fresh ones hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.normal_(bias, 0, 0.5)
    return model.eval()


@torch.no_grad()
def rewritten(model: nn.Module, shapes: list[tuple[int, ...]] = SHAPES) -> fx.GraphModule:
    """The graph, which gives what the model gives for inputs of all these shapes.

    It does so in PyTorch and in a program, whose kernels take what they know.
    """
    randomised(model)
    graph = Rewriter(model, torch.randn(shapes[0])).run()
    for shape in shapes:
        x = torch.randn(shape)
        wanted = model(x)
        torch.testing.assert_close(graph(x), wanted, rtol=1e-5, atol=1e-5)
        if not kernels.MISSING and x.ndim == 4:
            found = Program(graph, x, 1, {}).run(x)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    return graph


def operations(graph: fx.GraphModule) -> list[str]:
    """What a graph calls, in order."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            found.append(type(graph.get_submodule(str(node.target))).__name__)
        elif node.op in ("call_function", "call_method"):
            found.append(getattr(node.target, "__name__", str(node.target)))
    return found


def only(graph: fx.GraphModule, kind: type[nn.Module]) -> nn.Module:
    (found,) = (module for module in graph.modules() if type(module) is kind)
    return found


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: buffers, a product and a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale)


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: an assertion on the shape, F.batch_norm, and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        stats = (self.running_mean, self.running_var)
        return F.silu(F.batch_norm(x, *stats, self.weight, self.bias, False, 0.1, self.eps))


class Norm(nn.BatchNorm2d):
    """By torch.batch_norm, whose arguments come in another order than those of F.batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        given = (self.weight, self.bias, self.running_mean, self.running_var)
        return torch.batch_norm(x, *given, False, 0.1, self.eps, False)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.BatchNorm2d(6),
    "without scale": lambda: nn.BatchNorm2d(6, affine=False),
    "frozen": lambda: Frozen(6),
    "with activation": lambda: NormAct(6),
    "function of torch": lambda: Norm(6),
    "torchvision's frozen": lambda: FrozenBatchNorm2d(6),
}
BEFORE: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(8, 6, 3),
    "1x1 with bias": lambda: nn.Conv2d(8, 6, 1),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 5, 2, 2, groups=6)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("before", BEFORE)
def test_norms_of_any_kind_fold_into_the_convolution(norm: str, before: str) -> None:
    graph = rewritten(nn.Sequential(BEFORE[before](), NORMS[norm]()))
    assert set(operations(graph)) == {"FusedConv"}


def test_norms_that_no_convolution_precedes() -> None:
    graph = rewritten(nn.Sequential(NORMS["frozen"](), nn.ReLU()), [(2, 6, 5, 5)])
    assert operations(graph) == ["Pointwise"]
    graph = rewritten(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), [(4, 8), (2, 8)])
    assert operations(graph) == ["Linear"]


def test_norms_behind_each_other_are_one() -> None:
    graph = rewritten(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()))
    assert operations(graph) == ["Pointwise"]


def test_a_convolution_that_is_read_twice_keeps_its_output() -> None:
    model = Net(
        lambda m, x: m.bn(m.conv(x)) + m.conv(x).abs(),
        conv=nn.Conv2d(8, 6, 3),
        bn=nn.BatchNorm2d(6),
    )
    rewritten(model)
    model = Net(
        lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),
        conv=nn.Conv2d(8, 6, 3),
        bn=nn.BatchNorm2d(6),
    )
    rewritten(model)


class Same(nn.Conv2d):
    """As timm's Conv2dSame: the padding is computed of the size, which torch.fx cannot follow."""

    def kernel(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (1, 0):
            size, k, s = x.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * self.dilation[axis] + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.pad(x, pads)
        return F.conv2d(x, self.kernel(), self.bias, self.stride, 0, self.dilation, self.groups)


class Centred(Same):
    """The same with weights that are computed: without their mean."""

    def kernel(self) -> Tensor:
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)


class Twice(Same):
    """Something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("kernel", [3, 4, (5, 2)])
@pytest.mark.parametrize("kind", [Same, Centred])
def test_padding_to_the_same_size(kind: type[Same], kernel: object, stride: object) -> None:
    model = nn.Sequential(kind(8, 4, kernel, stride), nn.BatchNorm2d(4), nn.ReLU())
    graph = rewritten(model, [(2, 8, 12, 12), (1, 8, 11, 13), (1, 8, 7, 8)])
    assert operations(graph) == ["FusedConv"]


def test_a_convolution_that_computes_something_else_is_called_as_it_is() -> None:
    model = nn.Sequential(Twice(8, 4, 3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert operations(rewritten(model)) == ["Twice", "Pointwise", "FusedConv"]


BY_NAME: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str] | None]] = {
    "modules": (lambda m, x: m.act(input=m.bn(input=m.conv(input=x))), ["FusedConv"]),
    "concat": (
        lambda m, x: torch.cat(tensors=[m.conv(x), m.other(x)], dim=1),
        ["FusedConv", "FusedConv", "cat"],
    ),
    "convolution": (
        lambda m, x: F.relu(
            input=F.conv2d(input=x, weight=m.conv.weight, bias=m.conv.bias, stride=2), inplace=True
        ),
        ["FusedConv"],
    ),
    "norm": (
        lambda m, x: F.batch_norm(
            input=m.conv(x),
            weight=m.bn.weight,
            running_mean=m.bn.running_mean,
            running_var=m.bn.running_var,
            bias=m.bn.bias,
            training=False,
        ),
        ["FusedConv"],
    ),
    "prelu": (lambda m, x: F.prelu(input=m.conv(x), weight=m.act.weight), ["FusedConv"]),
    "head": (
        lambda m, x: F.linear(
            input=torch.flatten(
                input=F.adaptive_avg_pool2d(input=m.conv(x), output_size=1), start_dim=1
            ),
            weight=m.fc.weight,
        ),
        ["FusedConv", "AdaptiveAvgPool2d", "flatten", "Linear"],
    ),
    "maxima": (
        lambda m, x: (lambda y: y * torch.amax(input=y, dim=(2, 3), keepdim=True))(m.conv(x)),
        ["FusedConv", "amax", "Pointwise"],
    ),
    "pool": (
        lambda m, x: m.last(F.max_pool2d(input=m.conv(x), kernel_size=2)),
        ["FusedConv", "max_pool2d", "FusedConv"],
    ),
    "sum": (lambda m, x: torch.add(input=m.conv(x), other=m.other(x)), ["FusedConv"]),
    "sum, half": (lambda m, x: torch.add(m.conv(x), other=m.other(x), alpha=2), None),
    "shuffle": (
        lambda m, x: torch.reshape(
            input=torch.transpose(input=m.conv(x).unflatten(dim=1, sizes=(2, 3)), dim0=1, dim1=2),
            shape=(-1, 6, x.shape[2] - 2, x.shape[3] - 2),
        ),
        None,
    ),
    "another first": (
        lambda m, x: (lambda y: torch.where(condition=y > 0, input=y, other=-y))(m.conv(x)),
        None,
    ),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_by_name(name: str) -> None:
    function, wanted = BY_NAME[name]
    model = Net(
        function,
        conv=nn.Conv2d(8, 6, 3),
        other=nn.Conv2d(8, 6, 3),
        last=nn.Conv2d(6, 4, 1),
        bn=nn.BatchNorm2d(6),
        act=nn.PReLU(6),
        fc=nn.Linear(6, 5, bias=False),
    )
    found = operations(rewritten(model))
    assert wanted is None or found == wanted


PADDED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "function": lambda m, x: m.conv(F.pad(x, (1, 2, 0, 3))),
    "constant": lambda m, x: m.conv(F.pad(x, [1, 2, 0, 3], mode="constant", value=0.0)),
    "module": lambda m, x: m.conv(nn.ZeroPad2d((1, 2, 0, 3))(x)),
}


@pytest.mark.parametrize("how", PADDED)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}], ids=str)
def test_zeros_padded_before_a_convolution(how: str, options: dict[str, int]) -> None:
    graph = rewritten(Net(PADDED[how], conv=nn.Conv2d(8, 4, 3, **options)))
    assert operations(graph) == ["FusedConv"]


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
        lambda x: F.pad(x, (-1, 1, 0, 0)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    ],
)
def test_other_padding_stays(pad: Callable[[Tensor], Tensor]) -> None:
    graph = rewritten(Net(lambda m, x: m.conv(pad(x)), conv=nn.Conv2d(8, 4, 3)))
    assert operations(graph) == ["pad", "FusedConv"]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    conv = nn.Conv2d(8, 4, (4, 3), padding=padding, dilation=(1, 2))
    assert operations(rewritten(nn.Sequential(conv, nn.ReLU()))) == ["FusedConv"]


class Standardised(nn.Conv2d):
    """Weights that are computed of parameters by functions: constants."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0
        )
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_computed_weights_are_computed_once() -> None:
    model = nn.Sequential(Standardised(8, 4, 3, padding=1), nn.BatchNorm2d(4))
    assert operations(rewritten(model)) == ["FusedConv"]


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Activation]] = {
    "relu": (lambda x: x.clamp(min=0), Activation("relu")),
    "relu, in place": (lambda x: x.relu_(), Activation("relu")),
    "relu6": (lambda x: torch.clamp(x, 0.0, 6.0), Activation("relu6")),
    "relu6, module": (nn.Hardtanh(0.0, 6.0), Activation("relu6")),
    "leaky": (nn.LeakyReLU(0.2), Activation("leaky_relu", 0.2)),
    "elu": (nn.ELU(0.7), Activation("elu", 0.7)),
    "swish": (lambda x: x * x.sigmoid(), Activation("silu")),
    "swish, in place": (lambda x: x.mul(x.sigmoid()), Activation("silu")),
    "hard swish": (lambda x: x * F.relu6(x + 3.0) / 6.0, Activation("hardswish")),
    "hard swish, factor": (
        lambda x: x.mul((x + 3.0).clamp(0, 6).mul(1 / 6)),
        Activation("hardswish"),
    ),
    "hard sigmoid": (lambda x: F.relu6(x + 3.0) / 6.0, Activation("hardsigmoid")),
    "hard sigmoid of an ONNX file": (  # its slope is a sixth in float32
        lambda x: torch.clip(x * 0.1666666716337204 + 0.5, min=0.0, max=1.0),
        Activation("hardsigmoid"),
    ),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), Activation("mish")),
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), Activation("gelu")),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), Activation("gelu_tanh")),
    "sigmoid": (lambda x: 1 / (1 + (-x).exp()), Activation("sigmoid")),
    "tanh": (nn.Tanh(), Activation("tanh")),
    "tanh of a sigmoid": (lambda x: 2 * torch.sigmoid(2 * x) - 1, Activation("tanh")),
    "sigmoid of a tanh": (lambda x: 0.5 * (1 + torch.tanh(x / 2)), Activation("sigmoid")),
    "swish, quotient": (lambda x: x / (1 + (-x).exp()), Activation("silu")),
    "hard swish of an ONNX file": (
        lambda x: x * ((x + 3).clamp(0, 6) * 0.1666666716337204),
        Activation("hardswish"),
    ),
    "gelu, tanh, in numbers of float32": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788458 * (x + 0.044714998453 * x.pow(3)))),
        Activation("gelu_tanh"),
    ),
    "leaky, maximum": (lambda x: torch.maximum(x, 0.1 * x), Activation("leaky_relu", 0.1)),
    "elu of two relus": (
        lambda x: F.relu(x) + 0.3 * (x.clamp(max=0).exp() - 1),
        Activation("elu", 0.3),
    ),
    "relu of a magnitude": (lambda x: (x + x.abs()) / 2, Activation("relu")),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_what_they_compute(name: str) -> None:
    function, wanted = ACTIVATIONS[name]
    graph = rewritten(Net(lambda m, x: function(m.conv(x)), conv=nn.Conv2d(8, 4, 3)))
    assert operations(graph) == ["FusedConv"]
    found = only(graph, FusedConv).activation
    assert found.name == wanted.name
    assert found.parameter == pytest.approx(wanted.parameter)


@pytest.mark.parametrize("slopes", [1, 4])
def test_prelu_becomes_slopes(slopes: int) -> None:
    graph = rewritten(nn.Sequential(nn.Conv2d(8, 4, 3), nn.PReLU(slopes)))
    assert operations(graph) == ["FusedConv"]
    assert only(graph, FusedConv).slopes.shape == (slopes,)


STAY: dict[str, Callable[[Tensor], Tensor]] = {
    "unknown": lambda x: torch.sigmoid(2 * x),
    "nearly a hard sigmoid": lambda x: torch.clip(x * 0.1667 + 0.5, 0.0, 1.0),
    "of two maps": lambda x: x * torch.sigmoid(x.flip(1)),
    "of a part that is read elsewhere": lambda x: (lambda s: x * s + s)(torch.sigmoid(x)),
    "hard swish of another": lambda x: (x + 1) * F.relu6(x + 3.0) / 6.0,
    "softmax": lambda x: x.softmax(1),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_no_activation_stays(name: str) -> None:
    rewritten(Net(lambda m, x: STAY[name](m.conv(x)), conv=nn.Conv2d(8, 4, 3)))


BOUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y / y.sum((2, 3), keepdim=True).clamp_min(1e-12),
    "norm": lambda y: y / y.norm(dim=1, keepdim=True).clamp(min=1e-8),
    "maximum": lambda y: 1 / F.threshold(y.abs().amax(1, keepdim=True), 1e-20, 1e-20),
    "logarithm": lambda y: (100 * y).softmax(1).clamp(min=1e-8).log(),
    "logit": lambda y: (lambda p: torch.log(p / (1 - p)))(
        torch.sigmoid(100 * y).clamp(1e-7, 1 - 1e-7)
    ),
    "large": lambda y: F.relu(1e4 * y).clamp(max=500.0),
    "nearly a relu": lambda y: 1e12 * F.relu(y - 1e-9) - 1e12 * F.relu(y),
    "a small slope": lambda y: (lambda z: z * (z < 0))(F.leaky_relu(y, 1e-9)) * 1e9,
}


@torch.no_grad()
@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_that_guard_against_zero_and_overflow_stay(name: str) -> None:
    """They are none of an activation's, though what they change is far out, or near to 0."""
    model = Net(lambda m, x: BOUNDED[name](m.conv(x)), conv=nn.Conv2d(8, 4, 3, bias=False)).eval()
    graph = Rewriter(model, torch.randn(SHAPES[0])).run()
    for x in (torch.randn(SHAPES[0]), torch.zeros(SHAPES[0])):
        torch.testing.assert_close(graph(x), model(x), rtol=1e-3, atol=1e-5)
        if not kernels.MISSING:
            found = Program(graph, x, 1, {}).run(x)
            torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-5)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: (lambda z: z + y)(F.relu(y, inplace=True)),
    "module": lambda y: (lambda z: z + 2 * y)(nn.SiLU(inplace=True)(y)),
    "addition": lambda y: (lambda z: z * y)(y.add_(1.0)),
    "function": lambda y: (lambda z: z + y)(torch.sigmoid_(y)),
    "function of layers": lambda y: (lambda z: z * y)(F.leaky_relu_(y, 0.2)),
    "method": lambda y: (lambda z: z * y)(y.clamp_(max=0.5)),
    "twice": lambda y: (lambda z: z * y)(F.relu(y.mul_(2.0), inplace=True)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_was_changed_in_place_is_read_changed(name: str) -> None:
    rewritten(Net(lambda m, x: IN_PLACE[name](m.conv(x)), conv=nn.Conv2d(8, 4, 3)))


def test_copies_go() -> None:
    graph = rewritten(Net(lambda m, x: m.conv(x).clone().relu(), conv=nn.Conv2d(8, 4, 3)))
    assert operations(graph) == ["FusedConv"]


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "of what is written into": lambda y: (lambda z: z * y.mul_(2.0))(y.clone()),
    "that are written into": lambda y: (lambda z: z + y)(y.clone().add_(1.0)),
    "that are returned": lambda y: y.clone(),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_something_is_written_into(name: str) -> None:
    rewritten(Net(lambda m, x: COPIES[name](m.conv(x)), conv=nn.Conv2d(8, 4, 3)))


def gate(
    squeeze: Callable[[Tensor], Tensor],
    scale: Callable[[Tensor, Tensor], Tensor],
    *layers: nn.Module,
) -> Callable[[Tensor], Tensor]:
    inner = nn.Sequential(*layers)
    return Net(lambda m, x: scale(x, m.inner(squeeze(x))), inner=inner)  # type: ignore[return-value]


def _linears(norm: bool = False) -> list[nn.Module]:
    between = [nn.BatchNorm1d(3)] if norm else []
    return [nn.Linear(6, 3), *between, nn.ReLU(), nn.Linear(3, 6), nn.Sigmoid()]


def _convolutions(
    norm: bool = False, act: type[nn.Module] = nn.ReLU, last: type[nn.Module] = nn.Sigmoid
) -> list[nn.Module]:
    between = [nn.BatchNorm2d(3)] if norm else []
    return [nn.Conv2d(6, 3, 1), *between, act(), nn.Conv2d(3, 6, 1), last()]


def _mean4(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


SE: dict[str, Callable[[], nn.Module]] = {
    "own": lambda: SqueezeExcitation(6, hidden=3),
    "convolutions": lambda: gate(_mean4, torch.mul, *_convolutions()),
    "pooling module": lambda: gate(nn.AdaptiveAvgPool2d(1), torch.mul, *_convolutions()),
    "pooling made in the pass": lambda: gate(
        lambda x: nn.AdaptiveAvgPool2d(1)(x), torch.mul, *_convolutions()
    ),
    "pooling function": lambda: gate(
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)), torch.mul, *_convolutions()
    ),
    "pooling by size": lambda: gate(
        lambda x: F.avg_pool2d(x, x.size()[2:]), lambda x, s: x * s, *_convolutions()
    ),
    "pooling by sizes": lambda: gate(
        lambda x: F.avg_pool2d(x, (x.shape[2], x.shape[3])), torch.mul, *_convolutions()
    ),
    "positions in a row": lambda: gate(
        lambda x: x.flatten(2).mean(-1), lambda x, s: x * s[:, :, None, None], *_linears()
    ),
    "view": lambda: gate(
        lambda x: x.mean((-2, -1)), lambda x, s: x * s.view(x.size(0), x.size(1), 1, 1), *_linears()
    ),
    "expand": lambda: gate(
        lambda x: x.mean((2, 3)),
        lambda x, s: x * s.unsqueeze(2).unsqueeze(3).expand_as(x),
        *_linears(),
    ),
    "factor first": lambda: gate(_mean4, lambda x, s: s * x, *_convolutions()),
    "in place": lambda: gate(_mean4, lambda x, s: x.mul_(s), *_convolutions()),
    "norm": lambda: gate(_mean4, torch.mul, *_convolutions(norm=True)),
    "norm of vectors": lambda: gate(
        lambda x: x.mean((2, 3)), lambda x, s: x * s[..., None, None], *_linears(norm=True)
    ),
    "hard gates": lambda: gate(_mean4, torch.mul, *_convolutions(act=nn.SiLU, last=nn.Hardsigmoid)),
    "gate as a function": lambda: gate(
        _mean4, lambda x, s: x * (F.relu6(s + 3) / 6), *_convolutions(last=nn.Identity)
    ),
    "an unknown gate": lambda: gate(_mean4, lambda x, s: x * (2 * s), *_convolutions()),
    "one layer": lambda: gate(_mean4, torch.mul, nn.Conv2d(6, 6, 1), nn.Hardsigmoid()),
    "grouped layers": lambda: gate(
        _mean4,
        torch.mul,
        nn.Conv2d(6, 6, 1, groups=2),
        nn.SiLU(),
        nn.Conv2d(6, 6, 1, groups=3),
        nn.Sigmoid(),
    ),
    "maximum": lambda: gate(nn.AdaptiveMaxPool2d(1), torch.mul, *_convolutions()),
    "largest values": lambda: gate(
        lambda x: x.amax((2, 3), keepdim=True), torch.mul, *_convolutions()
    ),
    "mean and maximum": lambda: gate(
        lambda x: _mean4(x) + x.amax((2, 3), keepdim=True), torch.mul, *_convolutions()
    ),
    "two squeezes joined": lambda: gate(
        lambda x: torch.cat([_mean4(x), x.amax((2, 3), keepdim=True)], 1),
        torch.mul,
        nn.Conv2d(12, 6, 1),
        nn.Sigmoid(),
    ),
    "eca": lambda: gate(
        lambda x: x.mean((2, 3)).view(x.shape[0], 1, -1),
        lambda x, s: x * s.view(x.shape[0], -1, 1, 1),
        nn.Conv1d(1, 1, 3, padding=1),
        nn.Sigmoid(),
    ),
}


@pytest.mark.parametrize("name", SE)
@pytest.mark.parametrize("order", ["resnet", "mbconv"])
def test_se_in_any_clothing(name: str, order: str) -> None:
    """Its product is a `Pointwise` with gates, or gone into the convolution before it."""
    if order == "resnet":
        model = Net(
            lambda m, x: torch.relu(m.se(m.bn(m.conv(x))) + m.other(x)),
            conv=nn.Conv2d(8, 6, 3, padding=1),
            bn=nn.BatchNorm2d(6),
            se=SE[name](),
            other=nn.Conv2d(8, 6, 1),
        )
    else:
        layers = (nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.SiLU(), SE[name](), nn.Conv2d(6, 8, 1))
        model = nn.Sequential(*layers)
    graph = rewritten(model)
    gated = [
        n
        for n in graph.graph.nodes
        if n.op == "call_module" and len(n.args) > 1 and n.args[1] is not None
    ]
    assert len(gated) == 1
    assert not {"mul", "mul_"} & set(operations(graph)) or name in ("an unknown gate",)
    kind = type(graph.get_submodule(str(gated[0].target)))
    two = (
        "own",
        "convolutions",
        "view",
        "expand",
        "norm",
        "norm of vectors",
        "hard gates",
        "in place",
    )
    if order == "resnet" and name in two:
        assert kind is FusedConv
        assert only(graph, SqueezeGate).weight1.shape == (3, 8 * 9)
        assert operations(graph).count("FusedConv") == 2
    if order == "mbconv":
        assert kind is Pointwise
        assert gated[0].users.keys() == {n for n in graph.graph.nodes if gated[0] in n.args}
    if name not in ("eca", "largest values", "mean and maximum", "two squeezes joined", "own"):
        layers_of = [m for m in graph.modules() if isinstance(m, nn.Linear)]
        assert not layers_of  # they are 1×1 convolutions on (N,C,1,1)


ECA: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "view": lambda m, x: (
        x * m.conv(_mean2(x).view(x.shape[0], 1, -1)).sigmoid().view(x.shape[0], -1, 1, 1)
    ),
    "transpose": lambda m, x: (
        x
        * m.conv(_mean4(x).squeeze(-1).transpose(-1, -2)).sigmoid().transpose(-1, -2).unsqueeze(-1)
    ),
    "permute": lambda m, x: (
        x * m.conv(_mean4(x).flatten(2).permute(0, 2, 1)).permute(0, 2, 1)[..., None].sigmoid()
    ),
    "hard, with a bias": lambda m, x: (
        x * F.hardsigmoid(m.biased(_mean2(x).unsqueeze(1))).reshape(x.shape[0], -1, 1, 1)
    ),
}


def _mean2(x: Tensor) -> Tensor:
    return x.mean((2, 3))


@pytest.mark.parametrize("channels", [6, 16, 512])
@pytest.mark.parametrize("name", ECA)
def test_convolutions_over_channels_are_gates(name: str, channels: int) -> None:
    model = Net(
        lambda m, x: m.last(ECA[name](m, m.first(x))),
        first=nn.Sequential(nn.Conv2d(8, channels, 1), nn.SiLU()),
        conv=nn.Conv1d(1, 1, 3, padding=1, bias=False),
        biased=nn.Conv1d(1, 1, 5, padding=2),
        last=nn.Conv2d(channels, 8, 1),
    )
    shapes = [(2, 8, 5, 6), (1, 8, 7, 4)]
    graph = rewritten(model, shapes)
    wanted = ["FusedConv", "AdaptiveAvgPool2d", "Across", "Pointwise", "FusedConv"]
    assert operations(graph) == wanted
    for shape in shapes if not kernels.MISSING else ():
        program = Program(graph, torch.randn(shape), 2, {})
        assert not any(isinstance(part, TorchStep) for part in program.parts)


OTHER_ROWS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "around the ends": lambda m, x: (
        x
        * m.conv(F.pad(_mean2(x).unsqueeze(1), (1, 1), mode="circular")).view(x.shape[0], -1, 1, 1)
    ),
    "shorter": lambda m, x: x[:, 2:] * m.conv(_mean2(x).unsqueeze(1)).view(x.shape[0], -1, 1, 1),
    "in another order": lambda m, x: (
        x * _mean2(x).view(x.shape[0], 2, 4).transpose(1, 2).reshape(x.shape[0], 8, 1, 1).sigmoid()
    ),
    "of the images": lambda m, x: x * m.conv(_mean2(x).T[:, None]).mT[:, :, 0].T[..., None, None],
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_things_with_rows_of_channels_stay(name: str) -> None:
    """Among them transpositions that change the order of numbers, or are of the images."""
    model = Net(lambda m, x: OTHER_ROWS[name](m, x), conv=nn.Conv1d(1, 1, 3))
    if name == "of the images":
        model.conv = nn.Conv1d(1, 1, 3, padding=1)
        graph = rewritten(model, [(8, 8, 5, 6)])
    else:
        graph = rewritten(model, [(2, 8, 5, 6), (3, 8, 5, 6)])
    assert "Across" not in operations(graph)


MEANS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "of rows": lambda m, y: y.flatten(2).mean(2, keepdim=True),
    "into a layer": lambda m, y: m.fc(y.flatten(2).mean(-1, keepdim=True).transpose(1, 2)),
    "of maps": lambda m, y: y.mean((2, 3), keepdim=True),
    "without dimensions": lambda m, y: m.fc(y.flatten(2).mean(2)),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_keep_their_dimensions(name: str) -> None:
    model = Net(lambda m, x: MEANS[name](m, m.conv(x)), conv=nn.Conv2d(8, 6, 3), fc=nn.Linear(6, 4))
    assert "AdaptiveAvgPool2d" in operations(rewritten(model))


NO_SE: dict[str, Callable[[Tensor], Tensor]] = {
    "by position": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "one for all": lambda x: x * x.mean((1, 2, 3), keepdim=True).sigmoid(),
    "a map of one pixel at this size": lambda x: x * F.max_pool2d(x, 8).sigmoid(),
    "vectors of the images' number": lambda x: x * x.mean((2, 3)).sigmoid(),
}


@pytest.mark.parametrize("name", NO_SE)
def test_what_is_no_se_stays(name: str) -> None:
    """Among them what only looks like gates for the example's size."""
    shapes = {
        "a map of one pixel at this size": [(2, 8, 8, 8)],
        "vectors of the images' number": [(8, 8, 8, 8)],
    }
    graph = rewritten(Net(lambda m, x: NO_SE[name](x)), shapes.get(name, SHAPES))
    assert not any(len(n.args) > 1 for n in graph.graph.nodes if n.op == "call_module")


NOT_FIRST: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "read elsewhere": lambda m, x: (lambda y: m.se(y) + y)(m.conv(x)),
    "squeeze read elsewhere": lambda m, x: (
        lambda y: y * m.se.inner(y.mean((2, 3), keepdim=True)) + y.mean((2, 3), keepdim=True)
    )(m.conv(x)),
    "with stride": lambda m, x: m.se(m.strided(x)),
    "uneven padding": lambda m, x: m.se(m.uneven(x)),
    "behind an activation": lambda m, x: m.se(torch.relu(m.conv(x))),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NOT_FIRST)
def test_where_the_squeeze_stays_behind_the_convolution(name: str) -> None:
    model = Net(
        NOT_FIRST[name],
        conv=nn.Conv2d(8, 6, 3),
        strided=nn.Conv2d(8, 6, 1, 2),
        uneven=nn.Conv2d(8, 6, 2, padding="same"),
        se=SE["convolutions"](),
    )
    graph = rewritten(model)
    assert not any(isinstance(m, SqueezeGate) for m in graph.modules())
    assert "mul" not in operations(graph)


def test_a_vector_that_is_added_to_a_map() -> None:
    model = Net(
        lambda m, x: m.conv(x) + m.context(x.mean((2, 3), keepdim=True)),
        conv=nn.Conv2d(8, 6, 3),
        context=nn.Conv2d(8, 6, 1),
    )
    rewritten(model)


def test_vectors_that_serve_as_gates_and_otherwise() -> None:
    """What the gates' layers take in then must not end in what else reads them."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        v = m.bn(x.mean((2, 3)))
        return x * torch.sigmoid(v)[:, :, None, None] + m.fc(v)[:, :, None, None]

    rewritten(Net(forward, bn=nn.BatchNorm1d(8), fc=nn.Linear(8, 8)))


def test_a_squeeze_of_another_map() -> None:
    model = Net(
        lambda m, x: torch.relu(m.conv(x)) * m.gate(x.mean((2, 3), keepdim=True)).sigmoid(),
        conv=nn.Conv2d(8, 6, 3),
        gate=nn.Conv2d(8, 6, 1),
    )
    assert "mul" not in operations(rewritten(model))


def test_heads_end_in_a_flatten_and_a_linear_layer() -> None:
    heads: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda m, x: m.fc(m.pool(x).permute(0, 2, 3, 1).flatten(1)),
        lambda m, x: m.fc(m.pool(x).permute(0, 2, 3, 1).squeeze(1).squeeze(1)),
        lambda m, x: m.fc(m.pool(x).flatten(1)),
        lambda m, x: m.fc(m.pool(x).view(x.size(0), -1)),
        lambda m, x: m.fc(m.pool(x).view(-1, 8)),
        lambda m, x: m.fc(x.mean([2, 3])),
        lambda m, x: m.fc(m.pool(x).squeeze(3).squeeze(2)),
        lambda m, x: m.fc(m.pool(x)[:, :, 0, 0]),
        lambda m, x: m.fc(m.drop(torch.flatten(m.pool(x), 1))),
        lambda m, x: F.linear(
            F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1), m.fc.weight, m.fc.bias
        ),
    ]
    for head in heads:
        layers = {"pool": nn.AdaptiveAvgPool2d(1), "fc": nn.Linear(8, 5), "drop": nn.Dropout(0.3)}
        graph = rewritten(Net(head, **layers))
        assert operations(graph) == ["AdaptiveAvgPool2d", "flatten", "Linear"]


BRANCHES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], int]] = {
    "all": (lambda m, x: torch.relu(m.a(x) + m.b(x) + m.bn(x)), 1),
    "from zero": (lambda m, x: torch.relu(sum([m.a(x), m.b(x), m.bn(x)])), 1),
    "difference": (lambda m, x: m.b(x) - m.a(x), 1),
    "of other maps": (lambda m, x: m.a(x) + m.b(x + 1), 2),
    "behind an activation": (lambda m, x: m.a(x) + torch.relu(m.b(x)), 2),
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", BRANCHES)
def test_parallel_convolutions_are_one(name: str, groups: int) -> None:
    function, convolutions = BRANCHES[name]
    a = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    b = nn.Sequential(nn.Conv2d(8, 8, 1, groups=groups), nn.BatchNorm2d(8))
    graph = rewritten(Net(function, a=a, b=b, bn=nn.BatchNorm2d(8)))
    assert operations(graph).count("FusedConv") == convolutions


@pytest.mark.parametrize(
    "b",
    [
        nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 1, groups=2),
    ],
    ids=str,
)
def test_convolutions_that_do_not_fit_into_each_other_stay_two(b: nn.Conv2d) -> None:
    a = nn.Conv2d(8, 8, 3, padding=2 if b.padding == (1, 1) and b.kernel_size == (1, 1) else 1)
    graph = rewritten(Net(lambda m, x: m.a(x) + m.b(x), a=a, b=b))
    fits = b.kernel_size == (1, 1) and b.padding == (1, 1)
    assert operations(graph).count("FusedConv") == (1 if fits else 2)


def test_numbers_go_into_convolutions_before_and_behind() -> None:
    layers = {"a": nn.Conv2d(8, 8, 3), "b": nn.Conv2d(8, 4, 3, padding=1)}
    graph = rewritten(Net(lambda m, x: m.b(F.gelu(m.a(x) * 0.3) * 1.7), **layers))
    assert operations(graph) == ["FusedConv", "FusedConv"]
    graph = rewritten(Net(lambda m, x: F.gelu(m.a(x)).div(3) + x[..., 2:, 2:], **layers))
    assert "div" not in operations(graph)


OTHER_TYPES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "mask times one": lambda m, y: (y > 0) * 1,
    "mask and zero": lambda m, y: (y > 0) + 0,
    "mask times a number": lambda m, y: (y > 0) * 255,
    "mask in floats": lambda m, y: (lambda mask: m.other(y) * (1 - mask))((y > 0) * 1.0),
    "mask times a constant": lambda m, y: (y > 0) * m.numbers,
    "mask and a constant": lambda m, y: (y > 0) + m.numbers,
    "mask times a vector": lambda m, y: (y > 0) * y.mean((2, 3), keepdim=True),
    "map times a mask of vectors": lambda m, y: y * (y.mean((2, 3), keepdim=True) > 0),
    "classes": lambda m, y: y.argmax(1, keepdim=True) * 255,
    "classes and a constant": lambda m, y: y.argmax(1, keepdim=True) / 2,
    "rectified classes": lambda m, y: y.argmax(1, keepdim=True).relu() * 3,
    "other floats": lambda m, y: y.double() * 2,
    "a constant of other floats": lambda m, y: y * m.numbers.double(),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHER_TYPES)
def test_numbers_of_other_types_keep_them(name: str) -> None:
    model = Net(
        lambda m, x: OTHER_TYPES[name](m, m.conv(x)),
        conv=nn.Conv2d(8, 6, 1),
        other=nn.Conv2d(6, 6, 1),
    )
    model.register_buffer("numbers", torch.randint(1, 9, (1, 6, 1, 1)))
    rewritten(model)


@pytest.mark.skipif(bool(kernels.MISSING), reason=kernels.MISSING)
def test_sizes_take_no_time() -> None:
    """What reads shapes is known when a program is made; only the view runs in PyTorch."""
    model = Net(
        lambda m, x: m.conv(x).view(x.size(0), x.shape[1] // 2, 2, -1), conv=nn.Conv2d(8, 8, 1)
    )
    program = Program(rewritten(model), torch.randn(SHAPES[0]), 1, {})
    (step,) = (part for part in program.parts if isinstance(part, TorchStep))
    assert step.node.target == "view"


class Branching(nn.Module):
    """Control flow that depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


def test_a_module_that_cannot_be_followed_is_called_as_a_whole() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Sequential(Branching(), nn.Conv2d(8, 8, 1)), nn.ReLU()
    )
    graph = rewritten(model)
    assert operations(graph) == ["FusedConv", "Branching", "FusedConv"]
    rewriter = Rewriter(model, torch.randn(SHAPES[0]))
    assert list(rewriter.closed) == ["2.0"]
    assert "control flow" in rewriter.closed["2.0"]


def _joined(layer: nn.Module, parts: tuple[Tensor, ...]) -> Tensor:
    a, b, c = parts
    return torch.cat([layer(a), b, c], 1)


PARTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "split": lambda m, y: _joined(m.dw, y.split([3, 4, 5], 1)),
    "chunk": lambda m, y: sum(2 * part.sigmoid() for part in y.chunk(2, dim=1)),
    "slices": lambda m, y: torch.cat([y[:, :4] + y[:, 4:8], y[:, -4:, :, :]], 1),
    "split by size": lambda m, y: sum(m.a(part) for part in torch.split(y, y.shape[1] // 2, dim=1)),
    "last of a split": lambda m, y: torch.split(y, 5, dim=1)[-1] + torch.split(y, 5, 1)[1][:, :2],
}


@pytest.mark.parametrize("slopes", [0, 1, 12])
@pytest.mark.parametrize("name", PARTS)
def test_a_convolution_whose_channels_go_different_ways(name: str, slopes: int) -> None:
    activation = nn.PReLU(slopes) if slopes else nn.SiLU()
    model = Net(
        lambda m, x: PARTS[name](m, m.act(m.conv(x))),
        conv=nn.Conv2d(8, 12, 3),
        act=activation,
        dw=nn.Conv2d(3, 3, 3, padding=1, groups=3),
        a=nn.Conv2d(6, 2, 1),
    )
    graph = rewritten(model)
    rest = {"getitem"} if name == "last of a split" else set()
    assert {"split", "chunk", "getitem"} & set(operations(graph)) == rest


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "positions": lambda y: y[:, :6, 1:] + y[:, 6:, :-1],
    "images": lambda y: y[:1, :6] + y[1:2, 6:],
    "every second": lambda y: y[:, ::2] + y[:, 1::2],
    "along the rows": lambda y: sum(part for part in y.chunk(2, dim=2)),
    "read as a whole too": lambda y: torch.cat([y, sum(part for part in y.chunk(2, dim=1))], 1),
    "more than all": lambda y: y[:, :8] + y[:, 4:],
    "one": lambda y: y[:, 0] + y[:, 1],
}


@pytest.mark.parametrize("name", WHOLE)
def test_other_slices_stay(name: str) -> None:
    model = Net(lambda m, x: WHOLE[name](m.conv(x)), conv=nn.Conv2d(8, 12, 3))
    graph = rewritten(model, [(2, 8, 12, 12), (3, 8, 10, 14)])
    assert operations(graph).count("FusedConv") == 1


IN_PLACE_OF_PARTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "split": lambda m, y: sum(m.a(torch.relu(part)) for part in y.split([6, 6], 1)),
    "slices": lambda m, y: torch.cat([torch.relu(y[:, :6]), m.a(y[:, 6:]), y[:, 3:5]], 1),
    "of parts": lambda m, y: m.a((y[:, 2:])[:, :6]) + torch.relu(y[:, -7:-1]),
    "one part": lambda m, y: m.a(y.chunk(2, 1)[1]),
    "returned": lambda m, y: torch.relu(y)[:, 1:7],
    "first of a split, in place": lambda m, y: (
        lambda parts: torch.cat([torch.relu(parts[0]), parts[1], m.a(parts[0])], 1)
    )(y.chunk(2, 1)),
}


@pytest.mark.skipif(bool(kernels.MISSING), reason=kernels.MISSING)
@pytest.mark.parametrize("name", IN_PLACE_OF_PARTS)
def test_parts_of_a_map_are_read_where_it_lies(name: str) -> None:
    model = Net(
        lambda m, x: IN_PLACE_OF_PARTS[name](m, torch.relu(m.conv(x)) + x),
        conv=nn.Conv2d(12, 12, 3, padding=1),
        a=nn.Conv2d(6, 6, 3, padding=1),
    )
    shapes = [(2, 12, 12, 12), (4, 12, 9, 14)]
    program = Program(rewritten(model, shapes), torch.randn(shapes[1]), 2, {})
    assert not any(isinstance(part, TorchStep) for part in program.parts)


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """As torchvision's ShuffleNet does it."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


SHUFFLES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: _shuffled(x, 2),
    "other groups": lambda x: _shuffled(x, 6),
    "reshape": lambda x: (
        x.reshape(x.shape[0], 3, 4, x.shape[2], x.shape[3]).permute(0, 2, 1, 3, 4).flatten(1, 2)
    ),
    "unflatten": lambda x: x.unflatten(1, (4, -1)).swapaxes(1, 2).reshape(x.shape),
    "function": lambda x: F.channel_shuffle(x, 3),
    "module": nn.ChannelShuffle(4),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_channel_shuffles(name: str) -> None:
    model = Net(
        lambda m, x: torch.cat([m.a(part) for part in SHUFFLES[name](m.first(x)).chunk(2, 1)], 1),
        first=nn.Conv2d(8, 12, 1),
        a=nn.Conv2d(6, 6, 3, padding=1, groups=6),
    )
    graph = rewritten(model)
    assert [each for each in operations(graph) if each in ("view", "reshape", "flatten")] == []
    assert operations(graph).count("Shuffle") == 1
    for shape in SHAPES if not kernels.MISSING else ():
        program = Program(graph, torch.randn(shape), 2, {})
        assert not any(isinstance(part, TorchStep) for part in program.parts)


@torch.no_grad()
def test_a_shuffle_within_a_concat_and_of_many_images() -> None:
    """Its result lies among other channels, and images take turns."""
    model = randomised(
        Net(
            lambda m, x: m.last(torch.cat([_shuffled(m.a(x), 3), m.b(x)], 1)),
            a=nn.Conv2d(8, 36, 3, padding=1),
            b=nn.Conv2d(8, 5, 1),
            last=nn.Conv2d(41, 3, 1),
        )
    )
    rewritten(model, [(2, 8, 12, 12), (16, 8, 56, 56)])


NO_SHUFFLES: dict[str, Callable[[Tensor], Tensor]] = {
    "of rows": lambda x: x.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3),
    "of images": lambda x: x.view(2, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape),
    "of channels and rows": lambda x: x.transpose(1, 2).reshape(x.shape),
    "with other numbers": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) + x.exp(),
    "of rows by their number": lambda x: _rows_by_their_number(x),
}


def _rows_by_their_number(x: Tensor) -> Tensor:
    """Maps with few rows would divide by zero."""
    N, C, H, W = x.shape
    strips = H // 8
    return x.reshape(N, C, strips, H // strips, W).transpose(2, 3).reshape(N, C, H, W)


@pytest.mark.parametrize("name", NO_SHUFFLES)
def test_what_is_no_shuffle_of_channels_stays(name: str) -> None:
    model = Net(lambda m, x: NO_SHUFFLES[name](m.conv(x)), conv=nn.Conv2d(8, 8, 1))
    graph = rewritten(model, [(2, 8, 8, 8), (4, 8, 16, 10)])
    assert operations(graph).count("Shuffle") == (name == "with other numbers")


class Checking(nn.Module):
    """Branches on sizes, as code has them that wants to be safe."""

    def __init__(self, condition: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.condition = condition

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.condition(x) else self.b(x)


KNOWN: dict[str, Callable[[Tensor], object]] = {
    "channels": lambda x: x.shape[1] == 8,
    "more channels": lambda x: x.size(1) % 16 == 0 or x.size()[1] // 2 > 3,
    "dimensions": lambda x: x.dim() != 4,
    "every size": lambda x: len([size for size in x.shape[2:]]) == 2,  # noqa: C416  it iterates
}
UNKNOWN: dict[str, Callable[[Tensor], object]] = {
    "height": lambda x: x.shape[2] > 5,
    "width of a row": lambda x: x.transpose(1, 3).shape[1] > 8,
    "images": lambda x: x.shape[0] == 2,
    "square": lambda x: x.shape[2] == x.shape[3],
    "numbers": lambda x: x.sum() > 0,
    "parts of rows": lambda x: [part for part in x.split(4, dim=2)] == [],  # noqa: C416
}


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_branches_on_channels_are_followed(name: str) -> None:
    """And no others: they may go another way for other images."""
    model = nn.Sequential(Checking((KNOWN | UNKNOWN)[name]), nn.ReLU())
    wanted = ["FusedConv"] if name in KNOWN else ["Checking", "Pointwise"]
    assert operations(rewritten(model)) == wanted


def test_a_network_that_takes_one_size_is_called_where_it_branches() -> None:
    """On images of another size it raises."""

    def asserted(m: nn.Module, x: Tensor) -> Tensor:
        y = m.first(x)
        torch._assert(y.shape[2] == 12, "not twelve rows")
        return y.relu() if y.shape[1] == 6 else y

    model = nn.Sequential(Net(asserted, first=nn.Conv2d(8, 6, 1)), nn.ReLU())
    rewritten(model, [(2, 8, 12, 12), (3, 8, 12, 12)])


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "half": nn.AdaptiveAvgPool2d(6),
    "a third of the rows": nn.AdaptiveMaxPool2d((4, None)),
    "function": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "function, largest": lambda x: F.adaptive_max_pool2d(x, output_size=1),
    "largest": lambda x: x.amax((2, 3), keepdim=True),
    "largest, as a vector": lambda x: torch.amax(x, dim=(-1, -2))[:, :, None, None],
}


@pytest.mark.parametrize("name", POOLS)
def test_adaptive_pools(name: str) -> None:
    """In kernels where all windows have one size."""
    model = Net(lambda m, x: m.b(POOLS[name](m.a(x))), a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 4, 1))
    graph = rewritten(model, [(2, 8, 12, 12), (1, 8, 13, 11), (3, 8, 24, 18)])
    program = Program(graph, torch.randn(2, 8, 12, 12), 1, {}) if not kernels.MISSING else None
    left = (
        [part.node.name for part in program.parts if isinstance(part, TorchStep)] if program else []
    )
    assert left == (["getitem"] if "vector" in name else [])


class Up(nn.Module):
    """A step up of a U-Net, which makes its maps as large as the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = (
            nn.Conv2d(3 * channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )
        self.se = gate(_mean4, torch.mul, *_convolutions()) if channels == 6 else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.se(F.silu(self.bn(self.conv(torch.cat([skip, x], dim=1)))))


class UNet(nn.Module):
    """Down and up, with SE, scaled, padded and transposed maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in ((3, 6), (6, 12))
        )
        self.up, self.larger = Up(6), nn.ConvTranspose2d(6, 6, 2, 2)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.first(x)
        y = self.larger(self.up(self.second(a), a))
        rows, columns = x.size(2) - y.size(2), x.size(3) - y.size(3)
        y = F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        y = F.interpolate(y, scale_factor=2.0, mode="nearest")
        return {"out": F.avg_pool2d(self.last(y), 2), "pooled": F.adaptive_avg_pool2d(y, (3, 5))}


@torch.no_grad()
def test_a_u_net() -> None:
    model, x = randomised(UNet()), torch.randn(2, 3, 32, 32)
    fast = optimize(model, x, measure=False)
    assert list(fast.report.blocks.values()) == ["fused"]
    for images in (x, torch.randn(1, 3, 37, 43)):
        assert difference(fast(images), model(images)) <= 1e-5
    if not kernels.MISSING:
        named = ("interpolate", "ConvTranspose2d", "pad", "adaptive_avg_pool2d")
        assert set(fast.report.operations) == set(named)
        assert "interpolate (2)" in str(fast.report)


def _rows(x: Tensor) -> Tensor:
    """Each position of a map as a row."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


BY_NUMBERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "rows of a mask": lambda m, z: m.fc(z[z[:, 0] > 0]),
    "returned with their number": lambda m, z: (lambda y: (y, y.shape, y.relu().mean(0)))(
        z[z[:, 0] > 0]
    ),
    "numbers of a mask": lambda m, z: z.masked_select(z > 0).relu() * 2,
    "places": lambda m, z: torch.nonzero(z[:, 0] > 0)[:, 0].add(1).clamp(min=0),
    "where": lambda m, z: m.fc(z[torch.where(z[:, 0] > 0)[0]]),
    "unlike ones": lambda m, z: torch.unique(z.round()),
    "concatenated": lambda m, z: torch.cat([z[z[:, 0] > 0], z], dim=0),
    "concatenated along rows": lambda m, z: (lambda y: torch.cat([y, y], 1))(z[z[:, 0] > 0]),
    "as many as a number says": lambda m, z: m.fc(z[: (z[:, 0] > 0).sum().item()]),
    "each so often": lambda m, z: m.fc(z.repeat_interleave((z[:, 0] > 0).long(), dim=0)),
    "kept by their sum": lambda m, z: m.kept(z),
}


class Kept(nn.Module):
    """Rows that a mask tells; torch.fx cannot follow it."""

    def forward(self, z: Tensor) -> Tensor:
        return z[z[:, 0] > 0] if z.sum() > -1e9 else z


@torch.no_grad()
@pytest.mark.parametrize("name", BY_NUMBERS)
def test_shapes_that_depend_on_numbers(name: str) -> None:
    """What stands before them is rewritten nevertheless."""
    model = Net(
        lambda m, x: BY_NUMBERS[name](m, _rows(torch.relu(m.bn(m.conv(x))) - 0.3)),
        conv=nn.Conv2d(8, 6, 3, padding=1),
        bn=nn.BatchNorm2d(6),
        fc=nn.Linear(6, 4),
        kept=Kept(),
    )
    graph = Rewriter(randomised(model), torch.randn(SHAPES[0])).run()
    assert operations(graph).count("FusedConv") == 1
    assert "BatchNorm2d" not in operations(graph)
    for shape in (*SHAPES, SHAPES[0]):
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
        if not kernels.MISSING:
            found = Program(graph, x, 1, {}).run(x)
            torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_a_module_that_cannot_be_followed_has_a_shape_as_long_as_it_takes_no_mask() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Branching(), nn.Conv2d(8, 8, 1))
    traced = Rewriter(model, torch.randn(SHAPES[0]))
    shapes = {traced._edit.shape(node) for node in traced.graph.nodes if node.op == "call_module"}
    assert shapes == {SHAPES[0]}


def _derived(kind: type[nn.Module], *args: object) -> nn.Module:
    """A layer of a class of its own that gives something else, which torch.fx cannot follow."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * kind.forward(self, x) if x.sum().isfinite() else x

    return type(f"Other{kind.__name__}", (kind,), {"forward": forward})(*args)


DERIVED: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: _derived(nn.Conv2d, 8, 8, 1),
    "norm": lambda: _derived(nn.BatchNorm2d, 8),
    "activation": lambda: _derived(nn.ReLU),
    "average": lambda: _derived(nn.AvgPool2d, 3, 2),
    "largest": lambda: _derived(nn.MaxPool2d, 2),
    "pool": lambda: _derived(nn.AdaptiveAvgPool2d, 1),
    "nothing": lambda: _derived(nn.Identity),
    "dropout": lambda: _derived(nn.Dropout),
    "SE": lambda: _derived(SqueezeExcitation, 8),
    "flatten and layer": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        _derived(nn.Flatten),
        _derived(nn.Linear, 8, 8),
        _derived(nn.Unflatten, 1, (8, 1, 1)),
    ),
}


@separate_passes
@pytest.mark.parametrize("name", DERIVED)
def test_layers_of_derived_classes_are_called_as_they_are(name: str) -> None:
    rewritten(nn.Sequential(nn.Conv2d(8, 8, 3), DERIVED[name](), nn.Conv2d(8, 4, 1), nn.ReLU()))
    rewritten(Net(lambda m, x: x * m.other(x).amax((2, 3), keepdim=True), other=DERIVED[name]()))
