"""Constant factors move through a layer only where f(k·x) = k·f(x) for this k."""

import pytest
import torch
from torch import Tensor, nn

import senet
from senet.gates.fold import FoldReport, fold_gates
from senet.gates.record import record_gates

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
# Of k > 0 only.
LAYERS = [nn.ReLU, lambda: nn.MaxPool2d(2), lambda: nn.LeakyReLU(0.3), lambda: nn.PReLU(6)]
NAMES = ["relu", "max pooling", "leaky relu", "prelu"]


def constant(gate: Tensor) -> senet.SqueezeExcitation:
    """A block that multiplies by `gate`, whatever it gets."""
    se = senet.SqueezeExcitation(6, hidden=2, gate="tanh")
    with torch.no_grad():
        se.fc2.weight.zero_()
        se.fc2.bias.copy_(torch.atanh(gate))
    return se


def folded(*layers: nn.Module) -> FoldReport:
    """Fold the one block; the output must stay."""
    model = nn.Sequential(*layers).eval()
    report = fold_gates(model, record_gates(model, [X]), tolerance=1e-6, example_input=X[:1])
    with torch.no_grad():
        torch.testing.assert_close(report.model(X), model(X), rtol=1e-5, atol=1e-6)
    return report


POSITIVE = torch.tensor([0.9, 0.5, 0.1, 0.3, 0.7, 0.2])
ONE_NEGATIVE = POSITIVE * torch.tensor([1, 1, 1, -1, 1, 1])


@pytest.mark.parametrize("make", LAYERS, ids=NAMES)
@pytest.mark.parametrize("gate", [POSITIVE, -POSITIVE, ONE_NEGATIVE], ids=["+", "-", "one -"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_negative_factors_stay_where_only_positive_ones_pass(side, gate, make):
    se, last = constant(gate), nn.Conv2d(6, 4, 1)
    if side == "before":  # nothing behind it takes a factor
        (block,) = folded(nn.Conv2d(3, 6, 1), make(), se, nn.Tanh(), last).blocks
    else:
        (block,) = folded(nn.Conv2d(3, 6, 1), nn.Tanh(), se, make(), last).blocks
    moved = ("removed", side) if bool((gate > 0).all()) else ("constant", "")
    assert (block.kind, block.into) == moved


@pytest.mark.parametrize("make", [lambda: nn.AvgPool2d(2), nn.Dropout], ids=["pool", "dropout"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_any_factor_passes_what_is_linear(side, make):
    se, last = constant(ONE_NEGATIVE), nn.Conv2d(6, 4, 1)
    if side == "before":
        report = folded(nn.Conv2d(3, 6, 1), make(), se, nn.Tanh(), last)
    else:
        report = folded(nn.Conv2d(3, 6, 1), nn.Tanh(), se, make(), last)
    assert [(block.kind, block.into) for block in report.blocks] == [("removed", side)]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_a_factor_goes_into_the_input_channels_of_each_group(groups):
    """In order, whatever the groups: factors differ by channel."""
    last = nn.Conv2d(6, 12, 3, groups=groups)
    report = folded(nn.Conv2d(3, 6, 1), nn.Tanh(), constant(ONE_NEGATIVE), last)
    assert [(block.kind, block.into) for block in report.blocks] == [("removed", "after")]


def test_a_norm_behind_takes_a_factor_into_its_statistics():
    norm = nn.BatchNorm2d(6)
    for value in (norm.running_mean, norm.bias.data):
        nn.init.normal_(value)
    report = folded(nn.Conv2d(3, 6, 1), nn.Tanh(), constant(ONE_NEGATIVE), norm)
    assert [(block.kind, block.into) for block in report.blocks] == [("removed", "after")]
    # A factor of 0 has no inverse.
    gate = torch.cat([torch.zeros(1), POSITIVE[1:]])
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.running_mean)
    report = folded(nn.Conv2d(3, 6, 1), nn.Tanh(), constant(gate), norm)
    assert [block.kind for block in report.blocks] == ["constant"]


def test_a_shared_layer_is_not_scaled():
    shared = nn.Conv2d(6, 6, 1)
    (block,) = folded(nn.Conv2d(3, 6, 1), shared, nn.Tanh(), shared, constant(POSITIVE)).blocks
    assert block.kind == "constant"


class Function(nn.Module):
    """A function of one map, or of a map and a parameter."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.p = function, nn.Parameter(torch.full((6, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p)


FACTORS = {
    "product": lambda x, p: x * 3.0,
    "product with a parameter": lambda x, p: p * x,
    "quotient": lambda x, p: x / p,
}
OTHERS = {
    "square": lambda x, p: x * x,
    "reciprocal": lambda x, p: p / (x * x + 1),
    "constant over": lambda x, p: torch.div(p, x),
    "sum with a parameter": lambda x, p: x + p,
    "sum with a number": lambda x, p: x + 1,
    "number with a sum": lambda x, p: 1 + x,
}


@pytest.mark.parametrize("name", FACTORS)
def test_constant_factors_let_others_pass(name):
    report = folded(
        nn.Conv2d(3, 6, 1),
        Function(FACTORS[name]),
        constant(POSITIVE),
        nn.Tanh(),
        nn.Conv2d(6, 4, 1),
    )
    assert [(block.kind, block.into) for block in report.blocks] == [("removed", "before")]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_linear_lets_nothing_pass(name):
    report = folded(
        nn.Conv2d(3, 6, 1),
        Function(OTHERS[name]),
        constant(POSITIVE),
        nn.Tanh(),
        nn.Conv2d(6, 4, 1),
    )
    assert [block.kind for block in report.blocks] == ["constant"]


class Joined(nn.Module):
    """Two maps, or one twice, put together."""

    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.a(x), self.b(x))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda a, b: a + b, "removed"),
        (lambda a, b: torch.add(a, b, alpha=0.5), "removed"),
        (lambda a, b: torch.cat([a[:, :2], b[:, :4]], 1), "constant"),  # parts of maps
        (lambda a, b: a + a, "removed"),
        (lambda a, b: a * b, "constant"),
    ],
    ids=["sum", "weighted sum", "parts", "twice", "product"],
)
def test_all_that_is_added_takes_the_factor_once(function, kind):
    report = folded(Joined(function), constant(ONE_NEGATIVE), nn.Tanh(), nn.Conv2d(6, 4, 1))
    assert [block.kind for block in report.blocks] == [kind]


def test_each_part_of_a_concat_takes_its_own_factors():
    class Concat(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2 if twice else 4, 1)
            self.twice = twice

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return torch.cat([a, b, a] if self.twice else [a, b], 1)

    report = folded(Concat(False), constant(ONE_NEGATIVE), nn.Tanh(), nn.Conv2d(6, 4, 1))
    assert [(block.kind, block.into) for block in report.blocks] == [("removed", "before")]
    # A map that stands there twice cannot have two factors.
    report = folded(Concat(True), constant(ONE_NEGATIVE), nn.Tanh(), nn.Conv2d(6, 4, 1))
    assert [block.kind for block in report.blocks] == ["constant"]
