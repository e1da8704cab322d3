"""Gate statistics against a plain computation over all gates at once."""

import pytest
import timm
import torch
import torchvision
from tests.helpers.marks import separate_passes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import senet
from senet.anatomy import excitations
from senet.errors import UserError
from senet.gates.accumulators import Histogram, Moments
from senet.gates.record import fingerprint, record_gates
from senet.gates.statistics import GateStatistics
from senet.insertion.insert import insert
from senet.nn.block import SqueezeExcitation

NAMES = ("ape", "bee", "cow")
X = torch.randn(29, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Y = torch.arange(29) % 3
X += Y[:, None, None, None]  # so that classes differ


def loader(batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size)


@pytest.fixture
def model() -> nn.Module:
    model = senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2).eval()
    for block in excitations(model).values():
        nn.init.normal_(block.module.fc2.weight)
    return model


def all_gates(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Gates (N,C) and mean magnitudes (N,C) of a block in one batch, by hand."""
    seen = {}
    block = model.get_submodule(name)
    assert isinstance(block, SqueezeExcitation)
    handles = [
        block.gate.register_forward_hook(lambda _m, _i, out: seen.update(gates=out.double())),
        block.register_forward_pre_hook(lambda _m, i: seen.update(map=i[0].double())),
    ]
    with torch.no_grad():
        model(X)
    for handle in handles:
        handle.remove()
    return seen["gates"], seen["map"].abs().mean((2, 3))


@separate_passes
def test_statistics_are_those_of_all_gates_together(model):
    statistics = record_gates(model, loader(), classes=NAMES, top=4)
    assert statistics.images == 29
    assert statistics.classes == NAMES
    assert list(statistics.blocks) == ["layer1.0.se", "layer2.0.se", "layer3.0.se"]
    for name, block in statistics.blocks.items():
        gates, magnitude = all_gates(model, name)
        close = {"rtol": 1e-5, "atol": 1e-6}  # batches of other sizes, float32 kernels
        torch.testing.assert_close(block.mean, gates.mean(0), **close)
        torch.testing.assert_close(block.variance, gates.var(0, unbiased=False), **close)
        for number in range(3):
            mine = gates[number == Y]
            torch.testing.assert_close(block.class_mean[number], mine.mean(0), **close)
            torch.testing.assert_close(
                block.class_std[number], mine.std(0, unbiased=False), **close
            )
        for q in (0.05, 0.5, 0.95):
            error = (block.quantile(q) - gates.quantile(q, 0, interpolation="nearest")).abs()
            # A bin, and the step between neighbours of so few images.
            assert error.max() <= 1 / 256 + gates.sort(0).values.diff(dim=0).max()
        torch.testing.assert_close(block.smallest, gates.amin(0), rtol=1e-5, atol=1e-6)
        within = sum((gates[c == Y] - gates[c == Y].mean(0)).square().sum() for c in range(3))
        total = (gates - gates.mean(0)).square().sum()
        assert block.between_share == pytest.approx(float(1 - within / total), rel=1e-4)
        low, high = block.saturation
        assert low == pytest.approx(float((gates <= 0.05).double().mean()))
        assert high == pytest.approx(float((gates >= 0.95).double().mean()))
        torch.testing.assert_close(block.top.values, gates.sort(0, True).values[:4].T, **close)
        torch.testing.assert_close(gates.T.gather(1, block.top.images), block.top.values, **close)
        lost = ((gates - gates.mean(0)).abs() * magnitude).mean(0)
        assert (lost <= block.folding_bound * (1 + 1e-5)).all()


def test_result_does_not_depend_on_the_batches(model):
    a, b = (record_gates(model, loader(size), classes=NAMES) for size in (1, 29))
    for name in a.blocks:
        torch.testing.assert_close(a.blocks[name].mean, b.blocks[name].mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            a.blocks[name].variance, b.blocks[name].variance, rtol=1e-4, atol=1e-7
        )
    assert model.training is False


def test_memory_does_not_grow_with_the_images(model):
    """What is kept after 29 images is as large as what is kept after 290."""

    def size(statistics: GateStatistics) -> int:
        return sum(
            tensor.numel()
            for block in statistics.blocks.values()
            for tensor in (block.histogram.counts, block.moments.mean, block.top.values)
        )

    many = [batch for _ in range(10) for batch in loader()]
    assert size(record_gates(model, many, classes=NAMES)) == size(
        record_gates(model, loader(), classes=NAMES)
    )


def test_moments_merge_without_cancellation():
    x = 1e6 + torch.randn(100, 4, dtype=torch.float64)
    labels = torch.arange(100) % 2
    moments = Moments.zeros(2, 4)
    for start in range(0, 100, 7):
        moments.add(x[start : start + 7], labels[start : start + 7])
    mean, variance = moments.overall()
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(variance, x.var(0, unbiased=False), rtol=1e-8, atol=0)


def test_histogram_widens_on_both_sides():
    x = torch.cat([torch.linspace(-3, 5, 4001)[:, None]] * 2, 1).double()
    histogram = Histogram.zeros((2, 256), (0.0, 1.0))
    for part in x.split(100):
        histogram.add(part)
    assert int(histogram.counts.sum()) == 8002
    bin_width = (histogram.range[1] - histogram.range[0]) / 256
    for q in (0.01, 0.25, 0.5, 0.9):
        assert abs(float(histogram.quantile(q)[0]) - (-3 + 8 * q)) <= bin_width


@separate_passes
def test_separating_channels_are_the_most_different_ones(model):
    block = record_gates(model, loader(), classes=NAMES).blocks["layer3.0.se"]
    order = block.separating(0, 2, n=64)
    gates, _ = all_gates(model, "layer3.0.se")
    a, b = gates[Y == 0], gates[Y == 2]
    spread = ((a.var(0) * 9 + b.var(0) * 8) / 19).sqrt()
    distance = ((a.mean(0) - b.mean(0)).abs() / spread)[order]
    assert (distance.diff() <= 1e-3).all()
    assert torch.equal(order[:5], block.separating(2, 0, n=5))


def test_saved_statistics_come_back(model, tmp_path):
    statistics = record_gates(model, loader(), classes=NAMES)
    statistics.save(tmp_path / "gates.safetensors")
    again = GateStatistics.load(tmp_path / "gates.safetensors")
    assert again.classes == NAMES
    assert again.fingerprint == statistics.fingerprint == fingerprint(excitations(model))
    for name, block in statistics.blocks.items():
        other = again.blocks[name]
        assert torch.equal(other.class_mean, block.class_mean)
        assert torch.equal(other.quantile(0.3), block.quantile(0.3))
        assert torch.equal(other.class_quantile(0.3), block.class_quantile(0.3))
        assert (other.gate, other.limits, other.places) == (block.gate, block.limits, block.places)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no gate statistics"):
        GateStatistics.load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no such file"):
        GateStatistics.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("build", "count", "gate", "limits"),
    [
        (lambda: timm.create_model("seresnet18"), 8, "sigmoid", (0, 1)),
        (lambda: timm.create_model("legacy_seresnet18"), 8, "sigmoid", (0, 1)),
        (lambda: timm.create_model("mobilenetv3_small_050"), 9, "hard_sigmoid", (0, 1)),
        (lambda: timm.create_model("ese_vovnet19b_dw"), 4, "hard_sigmoid", (0, 1)),
        (lambda: torchvision.models.efficientnet_b0(), 16, "sigmoid", (0, 1)),
    ],
)
def test_blocks_of_other_libraries_are_seen(build, count, gate, limits):
    statistics = record_gates(build(), loader(), classes=NAMES)
    assert len(statistics.blocks) == count
    for block in statistics.blocks.values():
        assert block.gate == gate
        assert block.limits == limits
        assert block.count == 29


def test_inserted_blocks_are_seen_and_start_at_one():
    model = torchvision.models.resnet18()
    insert(model, example_input=X[:1])
    statistics = record_gates(model, (X[:4], X[4:9]))
    assert statistics.classes == ("all",)
    assert (
        statistics.stages()
        == {
            2: ["layer1.0.bn2.se", "layer1.1.bn2.se"],
            3: ["layer2.0.bn2.se", "layer2.1.bn2.se"],
            4: ["layer3.0.bn2.se", "layer3.1.bn2.se"],
            5: ["layer4.0.bn2.se", "layer4.1.bn2.se"],
        }
        or len(statistics.stages()) < 4
    )  # 32×32 images: the last stages have maps of one size
    for block in statistics.blocks.values():
        assert block.limits == (0.0, 2.0)
        assert torch.equal(block.mean, torch.ones_like(block.mean))
        assert block.between_share == 0.0


def test_look_alikes_are_recognised_by_name():
    class SELayer(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.fc = nn.Sequential(
                nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels), nn.Sigmoid()
            )

        def forward(self, x: Tensor) -> Tensor:
            return x * self.fc(x.mean((2, 3)))[:, :, None, None].expand_as(x)

    model = nn.Sequential(nn.Conv2d(3, 6, 1), SELayer(6))
    block = record_gates(model, loader(), classes=NAMES).blocks["1"]
    with torch.no_grad():
        gates = model[1].fc(model[0](X).mean((2, 3))).double()
    torch.testing.assert_close(block.mean, gates.mean(0), rtol=1e-5, atol=1e-6)


def test_bad_input_is_named(model):
    with pytest.raises(UserError, match="no SE blocks"):
        record_gates(torchvision.models.resnet18(), loader())
    with pytest.raises(UserError, match="gives no images"):
        record_gates(model, [], classes=NAMES)
    with pytest.raises(UserError, match="label 2 has no class: there are 2"):
        record_gates(model, loader(), classes=NAMES[:2])
    with pytest.raises(UserError, match="top must be at least 1"):
        record_gates(model, loader(), classes=NAMES, top=0)
    statistics = record_gates(model, loader(), classes=NAMES)
    with pytest.raises(UserError, match="no class 'be'; did you mean 'bee'"):
        statistics.class_number("be")


@pytest.mark.parametrize("squeeze", ["avg", "none"])
def test_class_means_are_those_of_the_gates(squeeze: str) -> None:
    """A gate for each position (squeeze="none") counts by its mean over the positions."""
    model = senet.create_model(
        "se_resnet8_cifar", num_classes=2, reduction=4, squeeze=squeeze
    ).eval()
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 0, 0, 1, 0])
    inputs: list[torch.Tensor] = []
    block = model.layer2[0].se
    hook = block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    found = record_gates(model, batches, classes=("cat", "dog"))
    hook.remove()
    assert list(found.blocks) == ["layer1.0.se", "layer2.0.se", "layer3.0.se"]
    inputs = inputs[1:]  # the first image is traced before
    gates = block.excite(torch.cat(inputs)).detach().flatten(2).mean(2).double()
    for label in (0, 1):
        wanted = gates[labels == label].mean(0)
        torch.testing.assert_close(
            found.blocks["layer2.0.se"].class_mean[label], wanted, rtol=1e-5, atol=0
        )
    assert not any(module._forward_hooks for module in model.modules())
