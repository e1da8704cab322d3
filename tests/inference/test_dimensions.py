"""Networks of one spatial dimension run as maps of one row; those of three keep their layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet import kernels
from senet.inference import optimize
from senet.inference.modules import FusedConv
from senet.inference.optimization import OptimizedModel
from senet.inference.report import OPTIMIZED, ORIGINAL
from senet.inference.rounding import difference
from senet.inference.steps import TorchStep
from senet.nn.block import SqueezeExcitation


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """With statistics and biases as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.normal_(bias, 0, 0.3)
    return model.eval()


def in_pytorch(fast: OptimizedModel, x: Tensor) -> list[str]:
    """What a program leaves to PyTorch."""
    plans = fast.network.plans(x)
    assert plans is not None
    steps = [step for step in plans.program(x).parts if isinstance(step, TorchStep)]
    return [step.node.name for step in steps]


class Layer(nn.Sequential):
    """Convolution of frames, ReLU and batch norm, as in ECAPA-TDNN."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        padding = dilation * (kernel - 1) // 2
        conv = nn.Conv1d(inputs, outputs, kernel, padding=padding, dilation=dilation)
        super().__init__(conv, nn.ReLU(), nn.BatchNorm1d(outputs))


class Res2(nn.Module):
    """Parts of the channels one behind the other, each convolved with the one before."""

    def __init__(self, channels: int, scale: int, dilation: int) -> None:
        super().__init__()
        each = channels // scale
        self.scale = scale
        self.blocks = nn.ModuleList(Layer(each, each, 3, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for i, part in enumerate(torch.chunk(x, self.scale, dim=1)):
            if i:
                part = self.blocks[i - 1](part if i == 1 else part + found[-1])
            found.append(part)
        return torch.cat(found, dim=1)


class Squeeze(nn.Module):
    """SE as speech networks write it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(channels, hidden, 1), nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean(dim=2, keepdim=True)
        return torch.sigmoid(self.conv2(torch.relu(self.conv1(s)))) * x


class Block(nn.Module):
    """An SE-Res2 block."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        res2 = Res2(channels, 4, dilation)
        first, last = Layer(channels, channels), Layer(channels, channels)
        self.layers = nn.Sequential(first, res2, last, Squeeze(channels, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Ecapa(nn.Module):
    """A small ECAPA-TDNN (arXiv 2005.07143), with the mean for its attentive statistics."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first = Layer(20, channels, 5)
        self.blocks = nn.ModuleList(Block(channels, dilation) for dilation in (2, 3))
        self.joined = nn.Sequential(nn.Conv1d(2 * channels, 48, 1), nn.ReLU())
        self.norm, self.fc = nn.BatchNorm1d(48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return self.fc(self.norm(self.joined(torch.cat(found, dim=1)).mean(-1)))


@torch.no_grad()
def test_an_ecapa_network_runs_in_the_kernels() -> None:
    model, x = trained(Ecapa()), torch.randn(2, 20, 50)
    fast = optimize(model, x)
    assert list(fast.report.blocks.values()) == ["fused", "fused"]
    assert set(fast.report.milliseconds) == {ORIGINAL, OPTIMIZED}
    fast = optimize(model, x, measure=False)
    for frames in (x, torch.randn(3, 20, 31), torch.randn(1, 50, 20).mT.contiguous()):
        wanted = model(frames)
        for found in (fast(frames), fast.network.graph_module(frames)):
            assert difference(found, wanted) <= 1e-5
    if not kernels.MISSING:
        assert in_pytorch(fast, x) == []
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    assert torch.equal(copied(x), fast(x))
    exported = torch.export.export(fast, (x,)).module()
    assert difference(exported(x), model(x)) <= 1e-5


class Function(nn.Module):
    """Layers, and a function of them and the frames."""

    def __init__(
        self, function: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


ROWS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv1d(8, 12, 7, 2, 3, bias=False),
        nn.BatchNorm1d(12),
        nn.SiLU(),
        nn.Conv1d(12, 12, 5, padding=4, dilation=2, groups=12),
        nn.PReLU(12),
        nn.Conv1d(12, 20, 3, groups=4, padding="same"),
        nn.GELU(),
    ),
    "pools": lambda: nn.Sequential(
        nn.Conv1d(8, 6, 1), nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2), nn.Conv1d(6, 4, 3)
    ),
    "norm first": lambda: nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3)),
    "padding": lambda: Function(lambda m, x: m.conv(F.pad(x, (2, 1))), conv=nn.Conv1d(8, 6, 4)),
    "own SE": lambda: nn.Sequential(
        nn.Conv1d(8, 12, 3), nn.BatchNorm1d(12), SqueezeExcitation(12, hidden=3, dims=1), nn.ReLU()
    ),
    "layers as gates": lambda: Function(
        lambda m, x: x * m.fc(x.mean(-1)).sigmoid().unsqueeze(-1), fc=nn.Linear(8, 8)
    ),
    "pool as gates": lambda: Function(
        lambda m, x: x * m.conv(m.pool(x)).sigmoid().expand_as(x),
        conv=nn.Conv1d(8, 8, 1),
        pool=nn.AdaptiveAvgPool1d(1),
    ),
    "split": lambda: Function(
        lambda m, x: torch.cat([p.relu() + m.b(x) for p in m.a(x).split([3, 3], dim=-2)], dim=-2),
        a=nn.Conv1d(8, 6, 3, padding=1),
        b=nn.Conv1d(8, 3, 1),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_maps_of_one_row(name: str) -> None:
    """All of these run in the kernels."""
    model, x = trained(ROWS[name]()), torch.randn(2, 8, 40)
    fast = optimize(model, x, measure=False)
    assert not fast.report.left
    for frames in (x, torch.randn(3, 8, 27)):
        wanted = model(frames)
        assert difference(fast(frames), wanted) <= 1e-5
        assert difference(fast.network.graph_module(frames), wanted) <= 1e-5
    if not kernels.MISSING:
        assert in_pytorch(fast, x) == []


ROWS_IN_PYTORCH: dict[str, Callable[[], nn.Module]] = {
    "softmax over frames": lambda: Function(
        lambda m, x: (x * m.conv(x).tanh().softmax(dim=2)).sum(2), conv=nn.Conv1d(8, 8, 1)
    ),
    "reflected": lambda: Function(
        lambda m, x: m.conv(F.pad(x, (2, 2), mode="reflect")).relu(), conv=nn.Conv1d(8, 6, 5)
    ),
    "shuffle": lambda: Function(
        lambda m, x: m.conv(x.view(x.shape[0], 2, 4, -1).transpose(1, 2).flatten(1, 2)),
        conv=nn.Conv1d(8, 6, 3),
    ),
    "frames as channels": lambda: Function(
        lambda m, x: m.norm(m.conv(x).mT).mT * x, conv=nn.Conv1d(8, 8, 1), norm=nn.LayerNorm(8)
    ),
    "recurrent": lambda: Function(
        lambda m, x: m.rnn(m.conv(x).transpose(1, 2))[0], conv=nn.Conv1d(8, 8, 1), rnn=nn.GRU(8, 4)
    ),
    "batch norm of layers": lambda: Function(
        lambda m, x: m.norm(m.fc(m.conv(x))),
        conv=nn.Conv1d(8, 6, 1),
        fc=nn.Linear(40, 6),
        norm=nn.BatchNorm1d(6),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS_IN_PYTORCH)
def test_what_the_kernels_do_not_know_of_rows(name: str) -> None:
    model, x = trained(ROWS_IN_PYTORCH[name]()), torch.randn(2, 8, 40)
    fast = optimize(model, x, measure=False)
    for frames in (x, torch.randn(3, 8, 40)):
        assert difference(fast(frames), model(frames)) <= 1e-5


@torch.no_grad()
def test_frames_in_a_network_of_images() -> None:
    """Convolutions of rows there are no maps: (N,C,L) may be tokens."""
    model = Function(
        lambda m, x: m.fc(m.row(m.image(x).flatten(2)).relu().transpose(1, 2)),
        image=nn.Conv2d(3, 8, 3),
        row=nn.Sequential(nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4)),
        fc=nn.Linear(4, 2),
    )
    fast = optimize(trained(model), torch.randn(2, 3, 9, 9), measure=False)
    assert sum(isinstance(m, FusedConv) for m in fast.modules()) == 2
    for x in (torch.randn(2, 3, 9, 9), torch.randn(1, 3, 8, 11)):
        assert difference(fast(x), model(x)) <= 1e-5


class Volumes(nn.Module):
    """A network of three spatial dimensions with SE, pools and an unknown head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv3d(2, 8, 3, 2, 1, bias=False), nn.BatchNorm3d(8), nn.SiLU(), nn.MaxPool3d(2)
        )
        self.depthwise = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm3d(8)
        self.se = SqueezeExcitation(8, hidden=2, dims=3)
        self.gate = nn.Conv3d(8, 8, 1)
        self.up = nn.ConvTranspose3d(8, 4, 2, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool3d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.se(self.norm(self.depthwise(x))) + x
        x = x * self.gate(x.mean((2, 3, 4), keepdim=True)).sigmoid()
        return self.fc(self.pool(self.up(x)).flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("measure", [False, True])
def test_volumes_keep_the_convolutions_of_pytorch(measure: bool) -> None:
    model, x = trained(Volumes()), torch.randn(2, 2, 9, 8, 8)
    fast = optimize(model, x, measure=measure)
    for volumes in (x, torch.randn(1, 2, 8, 11, 9)):
        assert difference(fast(volumes), model(volumes)) <= 1e-5
    if not measure:
        assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm3d)]
    assert "fused" not in fast.report.blocks.values()
    assert len(fast.report.blocks) == 2
