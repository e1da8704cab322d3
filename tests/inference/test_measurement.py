"""What `optimize` keeps and reports, with a clock and timings that the tests give."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from tests.helpers.marks import separate_passes
from torch import Tensor, nn

from senet import kernels
from senet.inference import measurement, optimization, optimize
from senet.inference.part import OptimizedPart
from senet.inference.report import CHANNELS_LAST, OPTIMIZED, ORIGINAL
from senet.nn.block import SqueezeExcitation


class Net(nn.Module):
    """Convolutions, SE of two kinds, and something that the kernels do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.se = SqueezeExcitation(8, hidden=2)
        self.none = SqueezeExcitation(8, hidden=2, squeeze="none")
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.none(self.se(self.bn(self.conv(x))))
        x = torch.relu(x) * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return x.cumsum(1)


def timings(monkeypatch: pytest.MonkeyPatch, milliseconds: Mapping[str, float]) -> list[list[str]]:
    """Let every comparison give these times; what was compared, in order."""
    seen: list[list[str]] = []

    def medians(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        seen.append(list(runs))
        for run in runs.values():
            run()
        return {name: milliseconds[name] for name in runs}

    monkeypatch.setattr(optimization, "medians", medians)
    return seen


@separate_passes
@torch.no_grad()
@pytest.mark.parametrize("fastest", [ORIGINAL, CHANNELS_LAST, OPTIMIZED])
def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    times = {ORIGINAL: 3.0, CHANNELS_LAST: 2.5, OPTIMIZED: 2.8} | {fastest: 1.25}
    timings(monkeypatch, times)
    model, x = Net().eval(), torch.randn(2, 3, 9, 9)
    fast = optimize(model, x)
    assert fast.report.kept == fastest
    assert fast.report.milliseconds == times
    assert isinstance(fast.network, OptimizedPart) == (fastest == OPTIMIZED)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    weights = [p for p in fast.parameters() if p.ndim == 4 and p.shape[2:] == (3, 3)]
    channels_last = [p.is_contiguous(memory_format=torch.channels_last) for p in weights]
    assert channels_last == [fastest == CHANNELS_LAST]
    assert f"{fastest} 1.25 ms" in str(fast.report)
    assert f"kept: {fastest}" in str(fast.report)
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in model.parameters())


@separate_passes
def test_nothing_is_measured_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = timings(monkeypatch, {})
    report = optimize(Net().eval(), torch.randn(2, 3, 9, 9), measure=False).report
    assert not seen
    assert not report.milliseconds
    assert not report.outside
    assert report.kept == OPTIMIZED
    assert "time" not in str(report)


@separate_passes
def test_each_se_block_is_in_the_report() -> None:
    report = optimize(Net().eval(), torch.randn(2, 3, 9, 9), measure=False).report
    assert report.blocks == {"se": "fused", "none": "squeeze='none'", "mul_2": "fused"}
    assert "SE blocks: 2 of 3 fused" in str(report)
    assert "SE block none: not fused (squeeze='none')" in str(report)


class Deep(nn.Module):
    """Weights of three spatial dimensions, which have no such memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 1, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.conv(x).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def test_channels_last_is_for_maps_of_two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, {ORIGINAL: 3.0, CHANNELS_LAST: 1.0, OPTIMIZED: 2.0})
    model, x = Deep().eval(), torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(optimize(model, x)(x), model(x))


class Around(nn.Module):
    """Control flow that depends on numbers, around two parts and in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), SqueezeExcitation(8))
        self.last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x if x.sum() > 0 else -x))


@torch.no_grad()
@pytest.mark.parametrize("before", [0.5, 2.0])
@pytest.mark.parametrize("outer", [False, True])
def test_parts_that_were_faster_before_stay(
    monkeypatch: pytest.MonkeyPatch, before: float, outer: bool
) -> None:
    timings(monkeypatch, {ORIGINAL: before, CHANNELS_LAST: 3.0, OPTIMIZED: 1.0})
    model = nn.Sequential(Around(), nn.Conv2d(8, 4, 1), nn.ReLU()) if outer else Around()
    name = "0." if outer else ""
    x = torch.randn(2, 3, 9, 9)
    fast = optimize(model.eval(), x)
    parts = (f"{name}first", f"{name}last")
    wanted = tuple((part, before, 1.0) for part in parts) if before < 1 else ()
    assert fast.report.slower == wanted
    assert fast.report.blocks == {f"{name}first.2": "fused"}
    assert any("control flow" in why for _, why in fast.report.left)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast(2 * x[:1]), model(2 * x[:1]), rtol=1e-5, atol=1e-6)


class Reading(Around):
    """The same, and what is around the parts reads more of them than their results."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first if x.sum().isfinite() else ():
            x = layer(x)
        return self.last(x)


@torch.no_grad()
def test_parts_whose_insides_are_read_stay() -> None:
    """Around a part that reads its children, all others are optimized."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), Reading(), nn.Conv2d(8, 4, 1), nn.ReLU()).eval()
    x = torch.randn(2, 3, 9, 9)
    fast = optimize(model, x, measure=False)
    left = dict(fast.report.left)
    assert left["1.first"].startswith("the module around it reads its insides")
    assert "1.last" not in left
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: Iterator[float]) -> None:
    """A clock that is these seconds later each time it is read."""
    total = itertools.accumulate(seconds)
    monkeypatch.setattr(measurement, "clock", lambda: next(total))
    monkeypatch.setattr(measurement.time, "sleep", lambda _: None)


def test_medians_of_runs_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, itertools.repeat(0.01))
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    found = measurement.medians(runs)  # type: ignore[arg-type]
    assert found == pytest.approx({"a": 10.0, "b": 10.0})
    assert order == ["a", "b"] * 8  # one round that does not count


def test_slow_runs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, itertools.repeat(1.0))
    order: list[str] = []
    measurement.medians({"a": lambda: order.append("a")})
    assert len(order) == 4


@pytest.mark.skipif(bool(kernels.MISSING), reason=kernels.MISSING)
def test_what_runs_outside_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes one tick: of the parts of the program, all but stretches of kernels."""
    ticking(monkeypatch, itertools.repeat(1.0))
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 1)),
        torch.randn(1, 3, 9, 9),
    )
    fast = optimize(model.eval(), x, measure=False)
    shares = measurement.outside(fast.network, x)
    assert shares == pytest.approx({"Softmax": 1 / 3})
    assert fast.report.operations == {"Softmax": 1}
    assert "outside of the kernels: Softmax (1)" in str(fast.report)
    whole = optimize(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), x, measure=False)
    assert "outside of the kernels: nothing" in str(whole.report)
    assert measurement.outside(whole.network, x) == {}
    double = optimize(model.double(), x.double(), measure=False)
    assert measurement.outside(double.network, x.double()) == {
        "the rewritten graph, in PyTorch": 1.0
    }
    partly = optimize(Around().eval(), x, measure=False)
    ticking(monkeypatch, itertools.chain([1.0] * 7, itertools.repeat(10.0)))
    # Two parts of one stretch take a second each of the ten that all takes.
    shares = measurement.outside(partly.network, x)
    assert shares == pytest.approx({"modules that are not optimized": 0.8})
