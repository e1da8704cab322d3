"""Optimized networks as CUDA graphs; `make test-gpu` runs it."""

import copy
import threading
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from senet import create_model
from senet.inference import OptimizedModel, optimize, replay
from senet.inference.part import OptimizedPart
from senet.inference.replay import Replays

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed")


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def model() -> nn.Module:
    network = create_model("se_resnet8_cifar", num_classes=4).cuda().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 32, 32), device="cuda")


def captured(optimized: OptimizedModel) -> list[object]:
    assert isinstance(optimized.network, OptimizedPart)
    replays = optimized.network._plans
    assert isinstance(replays, Replays)
    return list(replays.replays.values())


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_replays_give_the_networks_output(model: nn.Module) -> None:
    optimized = optimize(model, images())
    kept = []
    for shape in ((2, 3, 32, 32), (1, 3, 40, 24), (2, 3, 32, 32)) * 3:
        x = images(*shape)
        kept.append((optimized(x), model(x)))
    assert all(isinstance(each, replay._Replay) for each in captured(optimized))
    for found, wanted in kept:  # no output is overwritten by a later call
        assert_same(found, wanted)


@torch.no_grad()
def test_layouts_types_and_autocast(model: nn.Module) -> None:
    optimized = optimize(model, images())
    for _ in range(3):
        x = images()
        assert_same(optimized(x.contiguous(memory_format=torch.channels_last)), model(x))
        with torch.autocast("cuda", torch.bfloat16):
            half = optimized(x)
        assert (half - model(x)).abs().max() < 0.05 * model(x).abs().max()
    optimized, x = optimized.bfloat16(), images().bfloat16()
    for _ in range(3):
        assert optimized(x).dtype == torch.bfloat16


@torch.no_grad()
def test_edited_weights_are_seen(model: nn.Module) -> None:
    optimized, x = optimize(model, images()), images()
    for _ in range(3):
        before = optimized(x)
    bias = next(m.bias for m in optimized.modules() if isinstance(m, nn.Linear))
    bias.add_(1)
    assert_same(optimized(x), before + 1)
    bias.data = bias.data + 1
    for _ in range(3):
        assert_same(optimized(x), before + 2)
    duplicate = copy.deepcopy(optimized)
    bias.sub_(2)
    assert_same(duplicate(x), before + 2)
    assert_same(optimized(x), before)


def test_gradients_take_it_off_the_graph(model: nn.Module) -> None:
    optimized, x = optimize(model, images()), images().requires_grad_()
    for _ in range(3):
        optimized(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_threads_and_streams(model: nn.Module) -> None:
    optimized = optimize(model, images())
    inputs = [images() for _ in range(16)]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found = optimized(inputs[number])
                torch.cuda.current_stream().synchronize()
                if (found - wanted[number]).abs().max() > 1e-4 * wanted[number].abs().max():
                    wrong.append(number)

    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return OrderedDict(out=y, parts=(y.relu(), [y]))


class Waits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).cpu().to(x.device)


@torch.no_grad()
def test_containers_and_what_cannot_be_captured() -> None:
    nested = optimize(Nested().cuda(), images())
    first, *_, last = (nested(images()) for _ in range(4))
    assert type(last) is OrderedDict
    assert torch.equal(last["parts"][0], last["out"].relu())
    assert not torch.equal(first["out"], last["out"])
    waits, x = optimize(Waits().cuda(), images(), measure=False), images()
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"):
        second = waits(x)  # `optimize` called it once
    with warnings.catch_warnings(action="error"):
        assert torch.equal(waits(x), second)


@torch.no_grad()
def test_no_more_graphs_than_are_kept(model: nn.Module) -> None:
    optimized = optimize(model, images())
    for side in range(8, 12 + replay.KEPT):
        for _ in range(2):
            optimized(images(1, 3, side, side))
    assert len(captured(optimized)) == replay.KEPT
