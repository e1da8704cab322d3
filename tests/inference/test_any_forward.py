"""Networks whose forward does more than call layers: arguments, hooks, writing in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import senet
from senet.inference import OptimizedModel, optimize
from senet.inference.modules import AsItIs, FusedConv
from senet.inference.rounding import difference

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Three convolutions of 8 channels, the first from 3, and a function of them."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def alike(model: nn.Module, *shapes: tuple[int, ...]) -> OptimizedModel:
    """The model optimized for the first of some shapes; it gives for all what the model gives."""
    model.eval()
    fast = optimize(model, torch.randn(shapes[0]), measure=False)
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            assert difference(fast(x.clone()), model(x.clone())) < 1e-5
    return fast


def layers(fast: nn.Module) -> int:
    """Convolutions that were rewritten."""
    return sum(isinstance(module, FusedConv) for module in fast.modules())


class Positions(nn.Module):
    """Adds positions of 7×7, made as large as the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.positions = nn.Parameter(torch.randn(1, 8, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        return F.relu(self.conv(x) + F.interpolate(self.positions, size=size, mode="bilinear"))


def test_shortcut_that_is_repeated_over_other_batches() -> None:
    alike(Positions(), (1, 3, 12, 12), (4, 3, 12, 12), (2, 3, 16, 16))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.relu(m.c(m.b(m.a(x))) + F.adaptive_avg_pool2d(m.a(x), 1)),
        lambda m, x: m.b(m.a(x).mean(3, keepdim=True)) + m.c(m.a(x).mean(2, keepdim=True)),
    ],
)
def test_shortcut_that_is_repeated_over_other_sizes(function: Forward) -> None:
    alike(Net(function), (2, 3, 1, 1), (2, 3, 16, 16), (1, 3, 8, 12))


def test_slice_that_is_whole_for_the_example_only() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).transpose(1, 2)[:, :8].transpose(1, 2))

    alike(Net(function), (2, 3, 8, 8), (2, 3, 16, 16))


def test_slice_of_all_channels_goes() -> None:
    fast = alike(Net(lambda m, x: m.b(m.a(x)[:, :8])), (2, 3, 8, 8), (1, 3, 9, 12))
    assert not fast.report.operations


class Optional(nn.Module):
    """Takes more than images, if it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *more: Any, scale: float = 1.0, **options: Any
    ) -> Any:
        y = self.conv(x) * scale
        return y if mask is None else (y, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_keep_their_defaults(dtype: torch.dtype) -> None:
    model, x = Optional().to(dtype).requires_grad_(False), torch.randn(2, 3, 8, 8, dtype=dtype)
    fast = optimize(model, x, measure=False)
    assert isinstance(fast(x), Tensor)
    assert difference(fast(x), model(x)) < 1e-5


class AnyNumber(nn.Module):
    """Takes its image among any number of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.conv(inputs[0])


def test_any_number_of_arguments() -> None:
    assert layers(alike(AnyNumber(), (2, 3, 8, 8), (1, 3, 9, 9))) == 1


class Parent(nn.Module):
    """Cannot be traced, and gives a child more than a map, by position or by name."""

    def __init__(self, child: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.child = child
        self.call = call

    def forward(self, x: Tensor) -> Any:
        if float(x.abs().sum()) < 0:
            return x
        return self.call(self, self.stem(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.child(x),
        lambda m, x: m.child(x, None),
        lambda m, x: m.child(x, x.sum(1)),
        lambda m, x: m.child(x, mask=x.sum(1)),
        lambda m, x: m.child(x, scale=0.5),
    ],
)
def test_arguments_of_a_part(call: Callable[[Any, Tensor], Any]) -> None:
    alike(Parent(Optional(), call), (2, 3, 8, 8), (1, 3, 9, 9))


class Inside(nn.Module):
    """Reads what its projection begins with, besides its result."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor, k: int) -> Tensor:
        if float(x.abs().sum()) < 0:
            return x
        return self.projection(x) + k * self.projection[0](x)


def test_part_with_two_arguments_that_reads_a_childs_insides() -> None:
    fast = alike(Parent(Inside(), lambda m, x: m.child(x, 2)), (2, 3, 8, 8))
    assert any("reads its insides" in why for _, why in fast.report.left)


class Wrapped(nn.Module):
    """A network, named so that what is known of it cannot come from its class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)))


def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def halved(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / 2,)


@pytest.mark.parametrize("name", ["", "conv", "norm", "last", "last.0"])
def test_hooks_run(name: str) -> None:
    model = Wrapped()
    model.get_submodule(name).register_forward_hook(twice)
    model.get_submodule(name).register_forward_pre_hook(halved)
    fast = alike(model, (2, 3, 8, 8), (1, 3, 9, 9))
    assert layers(fast) >= 1  # the others are rewritten all the same
    x = torch.randn(2, 3, 8, 8)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(x), fast(x))


def test_hook_of_a_layer_sees_every_call() -> None:
    model, seen = Wrapped(), []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    fast = alike(model, (2, 3, 8, 8))
    for _ in range(2):  # in the first call of a shape it sees tensors without data too
        before = len(seen)
        fast(torch.randn(5, 3, 8, 8))
    assert seen[before:] == [(5, 8, 8, 8)]
    assert ("norm", "hooks look at what it gives") in fast.report.left
    assert sum(isinstance(module, AsItIs) for module in fast.modules()) == 1


def test_forward_that_was_set() -> None:
    model = Wrapped()
    model.norm.forward = MethodType(lambda self, x: x + 1, model.norm)  # type: ignore[method-assign]
    alike(model, (2, 3, 8, 8))
    model.forward = MethodType(lambda self, x: self.conv(x) + 1, model)  # type: ignore[method-assign]
    alike(model, (2, 3, 8, 8))


class Residual(nn.Module):
    """A residual block whose branch ends in a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


def test_inserted_blocks_run_in_the_kernels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Residual(), Residual())
    senet.insert(model, example_input=torch.randn(2, 3, 8, 8))
    for module in model.modules():
        if isinstance(module, senet.SqueezeExcitation):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    fast = alike(model, (2, 3, 8, 8), (1, 3, 9, 9))
    assert list(fast.report.blocks.values()) == ["fused", "fused"]
    assert not fast.report.operations


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [
        weight_norm,
        spectral_norm,
        lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    ],
)
def test_weights_that_hooks_compute(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = Wrapped()
    with torch.no_grad():
        norm(model.conv)
    for name, parameter in model.conv.named_parameters():  # the weight itself is stale now
        parameter.data.mul_(3 if name == "weight_g" else -1)
    assert layers(alike(model, (2, 3, 8, 8), (1, 3, 9, 9))) == 2


def _alias(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    kept = y
    y += m.b(y)
    return m.c(y) + kept


def _neutral(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    other = y * 1
    other.add_(1)
    return y + other


def _views_before(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    left, right = y.chunk(2, 1)
    F.relu(y, inplace=True)
    return left + right


def _siblings(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    first, second = y[:, :4], y[:, :2]
    first.mul_(2)
    return second + 1


def _contiguous(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    same = y.contiguous()
    same.relu_()
    return m.b(y) + same


def _views_behind(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    y.relu_()
    return m.c(y.flatten(2).view(y.shape))


def _counted(m: Any, x: Tensor) -> Tensor:
    n = x.shape[1]
    kept = n
    n += 1
    y = m.a(x)
    return m.b(y) * kept + n


@pytest.mark.parametrize(
    "function",
    [_alias, _neutral, _views_before, _siblings, _contiguous, _views_behind, _counted],
)
def test_writing_in_place(function: Forward) -> None:
    alike(Net(function), (2, 3, 8, 8), (1, 3, 9, 9))


def test_writing_into_views_made_behind_is_traced() -> None:
    assert layers(alike(Net(_views_behind), (2, 3, 8, 8))) == 3
    assert layers(alike(Net(_alias), (2, 3, 8, 8))) == 3


class Writer(nn.Module):
    """Cannot be traced, and writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3) if float(x.abs().sum()) >= 0 else x


def test_no_convolution_is_moved_behind_a_write() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(y)
        return m.writer(y) + z

    model = Net(function)
    model.add_module("writer", Writer())
    alike(model, (2, 3, 8, 8))


def test_modules_that_are_not_registered() -> None:
    hidden = nn.Conv2d(8, 8, 1)
    alike(Net(lambda m, x: hidden(m.a(x))), (2, 3, 8, 8))


def test_images_normalised_in_place() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return m.a(x.sub_(3).div_(7))

    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    fast = optimize(Net(function), x, measure=False)
    assert torch.equal(x, before)
    assert fast.report.difference < 1e-5
