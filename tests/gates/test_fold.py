"""Folded networks compute what the network with constant gates computes."""

import copy

import pytest
import timm
import torch
import torchvision
from tests.helpers.marks import separate_passes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import senet
from senet.anatomy import excitations
from senet.errors import UserError
from senet.gates.blocks import ConstantScale, restructure
from senet.gates.fold import fold_gates
from senet.gates.record import record_gates
from senet.insertion.insert import insert
from senet.insertion.replace import replace_block

X = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(2))
Y = torch.arange(12) % 3
LOADER = DataLoader(TensorDataset(X, Y), 6)
NAMES = ("a", "b", "c")
LAST = ("fc2.weight", "conv_expand.weight", "fc.weight")


def prepared(model: nn.Module) -> nn.Module:
    """Weights as after a training: batch norms and gates that do something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.3)
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
        for block in excitations(model).values():
            for key, parameter in block.module.named_parameters():
                if key in LAST:
                    parameter.normal_(0, 1)
                if key == "fc2.bias":
                    parameter.normal_(0, 0.3)
    return model.eval()


def silence(model: nn.Module, step: int) -> nn.Module:
    """Every `step`-th gate of each block independent of the input."""
    with torch.no_grad():
        for block in excitations(model).values():
            for key, parameter in block.module.named_parameters():
                if key in LAST:
                    parameter[::step] = 0
    return model


def inserted(model: nn.Module) -> nn.Module:
    insert(model, example_input=X[:1])
    return model


MODELS = {
    "own, residual": (
        lambda: senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2),
        "before",
    ),
    "own, concatenation": (lambda: senet.create_model("se_shufflenet_g3", num_classes=3), "before"),
    "own, vgg": (lambda: senet.create_model("se_vgg16_bn", num_classes=0), "before"),
    "timm, residual": (lambda: timm.create_model("seresnet18", num_classes=3), "before"),
    "timm, legacy": (lambda: timm.create_model("legacy_seresnet18", num_classes=3), "before"),
    "timm, depthwise": (lambda: timm.create_model("efficientnet_b0", num_classes=3), "after"),
    "torchvision, residual": (
        lambda: torchvision.models.regnet_y_400mf(num_classes=3),
        "before",
    ),
    "inserted, residual": (lambda: inserted(torchvision.models.resnet18()), "before"),
    "inserted, concat": (lambda: inserted(torchvision.models.squeezenet1_1()), "before"),
    "inserted, channels last": (
        lambda: inserted(timm.create_model("convnext_atto", conv_mlp=False, ls_init_value=0.5)),
        "before",
    ),
    "inserted, before a norm": (
        lambda: inserted(torchvision.models.densenet121()),
        "after",
    ),
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to the rounding of a few dozen layers in float32."""
    assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_constant_blocks_vanish_and_leave_the_output(name):
    build, into = MODELS[name]
    model = silence(prepared(build()), 1)
    before = copy.deepcopy(model.state_dict())
    statistics = record_gates(model, LOADER, classes=NAMES)
    report = fold_gates(model, statistics, tolerance=1e-5, example_input=X[:1])
    assert {block.kind for block in report.blocks} == {"removed"}
    assert into in {block.into for block in report.blocks}
    assert not excitations(report.model, X[:1])
    with torch.no_grad():
        close(report.model(X), model(X))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gone = sum(block.parameters for block in excitations(model).values())
    assert report.before.parameters - report.after.parameters == gone
    assert report.after.multiply_adds < report.before.multiply_adds


@separate_passes
@pytest.mark.parametrize(
    "name", ["own, residual", "timm, residual", "timm, depthwise", "torchvision, residual"]
)
def test_partly_constant_blocks_keep_a_smaller_excitation(name):
    model = silence(prepared(MODELS[name][0]()), 2)
    statistics = record_gates(model, LOADER, classes=NAMES)
    report = fold_gates(model, statistics, tolerance=1e-6, example_input=X[:1])
    assert {block.kind for block in report.blocks} == {"partial"}
    for block in report.blocks:
        assert (block.channels + 1) // 2 <= block.folded < block.channels
    with torch.no_grad():
        close(report.model(X), model(X))
        # The gates that are left still act.
        for module in report.model.modules():
            if type(module).__name__ == "PartialExcitation":
                module.fc2.weight.mul_(2)
        assert not torch.allclose(report.model(X), model(X), rtol=1e-4)
    assert report.after.parameters < report.before.parameters


@separate_passes
def test_structure_rebuilds_the_folded_network():
    model = silence(prepared(senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2)), 2)
    silence(model.layer2, 1)
    statistics = record_gates(model, LOADER, classes=NAMES)
    report = fold_gates(model, statistics, tolerance=1e-6)
    assert [block.kind for block in report.blocks] == ["partial", "removed", "partial"]
    fresh = senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2)
    restructure(fresh, report.structure)
    fresh.load_state_dict(report.model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(X), report.model(X))
    assert report.model.config["folded"] == report.structure


def test_constants_stay_as_a_factor_where_no_layer_takes_them():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), senet.SqueezeExcitation(8), nn.Tanh())
    silence(model, 1)
    statistics = record_gates(model, [X])
    report = fold_gates(model, statistics, tolerance=1e-6, example_input=X[:1])
    assert [(b.kind, b.into) for b in report.blocks] == [("constant", "")]
    assert "no layer" in report.blocks[0].why
    with torch.no_grad():
        close(report.model(X), model(X))


def test_a_map_that_others_read_is_not_scaled():
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.se = nn.Conv2d(3, 8, 1), senet.SqueezeExcitation(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.se(x) + x

    model = silence(Forked(), 1)
    report = fold_gates(model, record_gates(model, [X]), tolerance=1e-6, example_input=X[:1])
    assert report.blocks[0].kind == "constant"
    with torch.no_grad():
        close(report.model(X), model(X))


def labels_of(model: nn.Module) -> DataLoader:
    """Data on which the model is right everywhere."""
    with torch.no_grad():
        return DataLoader(TensorDataset(X, model(X).argmax(1)), 6)


def test_measures_and_backs_off_until_the_drop_is_allowed():
    torch.manual_seed(4)
    model = prepared(senet.create_model("se_resnet8_cifar", num_classes=50, reduction=2))
    loader = labels_of(model)
    statistics = record_gates(model, loader, classes=[str(i) for i in range(50)])
    free = fold_gates(model, statistics, tolerance=10, loader=loader)
    assert free.before.top1 == 100
    assert free.drop > 0, "the test needs gates that matter"
    assert all(block.kind == "removed" for block in free.blocks)
    tries = []
    bound = fold_gates(
        model,
        statistics,
        tolerance=10,
        loader=loader,
        max_drop=0,
        tried=lambda count, drop: tries.append((count, drop)),
    )
    assert bound.drop == 0
    assert [count for count, _ in tries] == list(range(3, 3 - len(tries), -1))
    assert all(drop > 0 for _, drop in tries[:-1])
    assert len(bound.restored) == len(tries) - 1
    # Those put back were predicted to harm most.
    harm = {block.name: block.loss_bound for block in free.blocks}
    left = [b.name for b in bound.blocks if b.kind != "kept"]
    assert not left or max(harm[n] for n in left) <= min(harm[n] for n in bound.restored)


class Restarting:
    """An iterator over the batches that iter() lets begin anew."""

    def __iter__(self):
        self.left = iter(LOADER)
        return self

    def __next__(self):
        return next(self.left)


@pytest.mark.parametrize("loader", [LOADER, lambda: iter(LOADER), Restarting])
def test_iterators_are_measured_on_all_their_batches(loader):
    model = prepared(senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2))
    statistics = record_gates(model, LOADER, classes=NAMES)
    with torch.no_grad():
        wanted = float((model(X).argmax(1) == Y).double().mean() * 100)
        loss = float(nn.functional.cross_entropy(model(X), Y))
    batches = loader if loader is LOADER else loader()
    report = fold_gates(model, statistics, tolerance=10, loader=batches)
    assert report.before.top1 == pytest.approx(wanted)
    assert report.before.loss == pytest.approx(loss, rel=1e-4)


def test_several_attempts_need_the_batches_several_times():
    torch.manual_seed(4)
    model = prepared(senet.create_model("se_resnet8_cifar", num_classes=50, reduction=2))
    loader = labels_of(model)
    statistics = record_gates(model, loader, classes=[str(i) for i in range(50)])
    arguments = {"tolerance": 10, "max_drop": 0}
    with pytest.raises(UserError, match=r"loader is a generator, .*pass a DataLoader"):
        fold_gates(model, statistics, loader=(batch for batch in loader), **arguments)
    with pytest.raises(UserError, match=r"gives them once, .*pass a DataLoader"):
        fold_gates(model, statistics, loader=iter(loader), **arguments)


def test_a_model_that_cannot_be_copied_is_refused():
    model = prepared(senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2))
    statistics = record_gates(model, LOADER, classes=NAMES)
    model.last = model(X[:1])
    with pytest.raises(UserError, match="holds last as a result of autograd; detach it"):
        fold_gates(model, statistics, example_input=X[:1])


def test_tolerance_zero_folds_only_constants():
    model = prepared(senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2))
    report = fold_gates(model, record_gates(model, LOADER, classes=NAMES), tolerance=0)
    assert {block.kind for block in report.blocks} == {"kept"}
    with torch.no_grad():
        assert torch.equal(report.model(X), model(X))


@separate_passes
def test_replaced_by_means_is_what_folding_approximates():
    """Where gates do vary, the folded network is the one whose gates are their means."""
    model = prepared(senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2))
    statistics = record_gates(model, LOADER, classes=NAMES)
    report = fold_gates(model, statistics, tolerance=10)
    truth = copy.deepcopy(model)
    for name, block in statistics.blocks.items():
        scale = ConstantScale(block.channels)
        scale.scale.copy_(block.mean)
        replace_block(truth, name, scale)
    with torch.no_grad():
        close(report.model(X), truth(X))


def test_bad_input_is_named():
    model = prepared(senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2))
    statistics = record_gates(model, LOADER, classes=NAMES)
    with pytest.raises(UserError, match="tolerance must be at least 0"):
        fold_gates(model, statistics, tolerance=-1)
    with pytest.raises(UserError, match="max_drop needs data"):
        fold_gates(model, statistics, max_drop=1)
    with pytest.raises(UserError, match="max_drop must be at least 0"):
        fold_gates(model, statistics, loader=LOADER, max_drop=-1)
    with pytest.raises(UserError, match="gives no images"):
        fold_gates(model, statistics, loader=[], max_drop=1)
    with pytest.raises(UserError, match="gives no class numbers"):
        fold_gates(model, statistics, loader=[X], example_input=X[:1])
    other = prepared(senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2))
    with pytest.raises(UserError, match="statistics are of another model"):
        fold_gates(other, statistics)
