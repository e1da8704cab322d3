"""What code does beside its operations: such modules are left, and changes of attributes count."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import senet
from senet.fusion import execution
from senet.fusion.forward import fused_forwards

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Unit(nn.Module):
    """conv → BN → activation, and what is asked of it."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(8), nn.ReLU() if act is None else act
        self.seen: Any = None
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class NoGrad(Unit):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return super().forward(x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Reversing(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return Reversed.apply(super().forward(x))


class Autocast(Unit):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return x.float() * 2


class Checkpointed(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Skipped(Unit):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 0 if self.training and random.random() < 0.5 else y


class Drawing(Unit):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * (torch.rand(1).item() < 0.5) if self.training else y


class OfTensors(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 255 if isinstance(x, Tensor) else x)


class ByMode(Unit):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if torch.is_grad_enabled() else y * 2


class Keeping(Unit):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)


class Counting(Unit):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        return super().forward(x)


REASONS = {
    NoGrad: "grad mode",
    Reversing: "a backward of its own",
    Autocast: "autocast",
    Checkpointed: "uses or asks for",
    Skipped: "random numbers",
    Drawing: "random numbers",
    OfTensors: "something else with tensors",
    ByMode: "grad mode",
    Keeping: "sets Keeping.seen",
    Counting: "sets Counting.c",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("inner", [False, True])
def test_what_a_graph_does_not_hold_is_left(kind: type[Unit], inner: bool) -> None:
    model = nn.Sequential(kind(), nn.Conv2d(8, 2, 1)) if inner else kind()
    numbers = random.getstate(), torch.get_rng_state()
    report = senet.fuse(model, X)
    assert report.fused == ()
    assert REASONS[kind] in report.left[0].reason
    assert random.getstate() == numbers[0]
    assert torch.equal(torch.get_rng_state(), numbers[1])
    unit = model[0] if inner else model
    assert (unit.seen, unit.calls, float(unit.count)) == (None, 0, 0.0)
    assert not list(fused_forwards(model))


def test_vectors_are_no_maps() -> None:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()]
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)
    fused = copy.deepcopy(plain)
    assert [part.name for part in senet.fuse(fused, X).fused] == ["1"]
    torch.testing.assert_close(fused(X), plain(X))
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    plain = copy.deepcopy(model)
    assert len(senet.fuse(model, torch.randn(4, 3, 5)).fused) == 1
    torch.testing.assert_close(model(X[..., 0, 0]), plain(X[..., 0, 0]))


def test_any_failure_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise KeyError("x")

    monkeypatch.setattr(execution, "normalized", fails)
    model = Unit()
    with pytest.raises(KeyError):
        senet.fuse(model, X)
    assert not list(fused_forwards(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    units = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.SiLU()) for _ in range(3)]
    assert len(senet.fuse(nn.Sequential(*units).to(dtype), X.to(dtype)).fused) == 3


def test_a_number_that_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    real = execution.normalized
    monkeypatch.setattr(execution, "normalized", lambda *a: real(*a) * float("nan"))
    with pytest.raises(senet.errors.SenetError, match="differ by nan"):
        senet.fuse(Unit(), X)


class Added(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x.size(1))


def test_a_number_is_added() -> None:
    plain, fused = Added(), Added()
    fused.load_state_dict(plain.state_dict())
    senet.fuse(fused, X)
    torch.testing.assert_close(fused(X), plain(X))


class Squeeze(nn.Module):
    """SE with places for more."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)
        self.one, self.number = nn.Parameter(torch.ones(())), 1.0
        self.weight = nn.Parameter(torch.ones(1, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        t = self.fc2(self.hidden(self.fc1(self.squeezed(x))))
        return x * self.gate(t)[:, :, None, None]

    def squeezed(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def hidden(self, t: Tensor) -> Tensor:
        return F.relu(t)

    def gate(self, t: Tensor) -> Tensor:
        return torch.sigmoid(t * self.number)


MORE: dict[str, tuple[str, Callable[..., Any]]] = {
    "temperature": ("gate", lambda s, t: torch.sigmoid(t / s.one)),
    "gain": ("gate", lambda s, t: torch.sigmoid(t) * s.one),
    "beta": ("hidden", lambda s, t: t * torch.sigmoid(s.one * t)),
    "dropout": ("squeezed", lambda s, x: F.dropout(x.mean((2, 3)), 0.5, s.training)),
    "dropped gate": ("gate", lambda s, t: F.dropout(torch.sigmoid(t), 0.5, s.training)),
    "weighted": ("squeezed", lambda s, x: (x * s.weight).mean((2, 3))),
    "images": ("squeezed", lambda s, x: x.mean((0, 2, 3))[None].expand(x.shape[0], -1)),
    "factor": ("squeezed", lambda s, x: x.mean((2, 3)) * 3),
    "norm": ("squeezed", lambda s, x: F.layer_norm(x.mean((2, 3)), (8,))),
    "detached": ("squeezed", lambda s, x: x.detach().mean((2, 3))),
    "other in training": ("forward", lambda s, x: x if s.training else Squeeze.forward(s, x)),
    "clamped": ("hidden", lambda s, t: t.clamp(0, 20)),
}


def network(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), block)


@pytest.mark.parametrize("what", MORE)
@pytest.mark.parametrize("example", [X, X[:1], torch.zeros(1, 3, 8, 8)])
def test_blocks_that_do_more_than_se(what: str, example: Tensor) -> None:
    name, function = MORE[what]
    report = senet.fuse(network(type("Block", (Squeeze,), {name: function})()), example)
    assert [part.form for part in report.fused] == ["norm → relu"]
    assert report.left[0].form == "se"


def test_a_number_of_a_block_counts() -> None:
    fused = network(Squeeze()).eval()
    assert [part.form for part in senet.fuse(fused, X).fused] == ["norm → relu → se"]
    fused[3].number = 3.0
    plain = copy.deepcopy(fused)
    senet.unfuse(plain)
    with pytest.warns(UserWarning, match="attributes that have changed"):
        assert torch.equal(fused(X), plain(X))


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 20)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(x), 3, 1, 1)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training)


class Scaled(nn.LeakyReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Straight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (F.relu(x) - x).detach()


@pytest.mark.parametrize("act", [Clipped, Pooled, Dropping, Scaled, Straight])
def test_what_only_looks_like_an_activation(act: type[nn.Module]) -> None:
    assert senet.fuse(Unit(act()).eval(), X).fused == ()


def test_an_activation_of_ones_own() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    assert [part.form for part in senet.fuse(Unit(Swish()), X).fused] == ["norm → silu"]


class Optional(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.function, self.options, self.padding = F.relu, {"twice": False}, [1, 1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.bn(self.conv(F.pad(x, (self.padding[0],) * 4))))
        return y * 2 if self.options["twice"] else y


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "slope": (lambda: Unit(nn.LeakyReLU(0.1)), lambda m: setattr(m.act, "negative_slope", 0.5)),
    "gelu": (lambda: Unit(nn.GELU()), lambda m: setattr(m.act, "approximate", "tanh")),
    "function": (Optional, lambda m: setattr(m, "function", F.silu)),
    "dict": (Optional, lambda m: m.options.update(twice=True)),
    "list": (Optional, lambda m: m.padding.__setitem__(0, 0)),
    "append": (lambda: network(nn.ReLU()), lambda m: m.append(nn.Conv2d(8, 2, 1))),
    "delete": (lambda: network(nn.Conv2d(8, 2, 1)), lambda m: m.__delitem__(-1)),
}


@pytest.mark.filterwarnings("ignore:senet runs")
@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_afterwards_counts(what: str) -> None:
    make, change = CHANGES[what]
    model = make().eval()
    assert senet.fuse(model, X).fused
    twin = copy.deepcopy(model)
    for changed in (model, twin):
        change(changed)
        plain = copy.deepcopy(changed)
        senet.unfuse(plain)
        assert torch.equal(changed(X), plain(X))


def depthwise() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)


@pytest.mark.filterwarnings("ignore:senet runs")
def test_depthwise_convolutions_that_change() -> None:
    model = nn.Sequential(depthwise(), nn.BatchNorm2d(3)).eval()
    nn.init.constant_(model[1].bias, 7.0)
    expected = model(X)
    plain = copy.deepcopy(model)
    assert len(senet.fuse(model, X).fused) == 1
    torch.testing.assert_close(model[0](X[0]), plain[0](X[0]))  # no batch
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(X), expected)
    model[0].dilation = model[0].padding = (2, 2)
    assert model[0](X).shape == (4, 3, 4, 4)


def test_an_argument_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = Unit()

        def forward(self, x: Tensor) -> Tensor:
            return self.unit(x=x)

    model = Outer()
    assert len(senet.fuse(model, X).fused) == 1
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *_: pytest.fail("it ran by itself"))
    model(X)
    with pytest.raises(TypeError):
        model.unit(y=X)
