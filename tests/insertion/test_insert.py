"""Insertion leaves the output bit-identical, trains, survives copying, and is undone exactly."""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from tests.helpers.marks import separate_passes
from torch import Tensor, nn

import senet
from senet.errors import SenetError, UserError
from senet.insertion.insert import insert, inserted_places, remove

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def blocks(model: nn.Module) -> list[senet.SqueezeExcitation]:
    return [m for m in model.modules() if isinstance(m, senet.SqueezeExcitation)]


def open_gates(model: nn.Module) -> nn.Module:
    """Gates that differ from 1, so that it can be seen whether they act."""
    for block in blocks(model):
        nn.init.normal_(block.fc2.bias)
    return model


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.3)
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
    return model


MODELS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision densenet121": lambda: torchvision.models.densenet121(num_classes=5),
    "torchvision squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=5),
    "timm convnext, channels last": lambda: timm.create_model(
        "convnext_atto", num_classes=5, conv_mlp=False, drop_path_rate=0.5, ls_init_value=0.5
    ),
    "timm mobilenetv1": lambda: timm.create_model("mobilenetv1_100", num_classes=5),
    "own resnet8": lambda: senet.create_model("resnet8_cifar", num_classes=5),
    "own vgg16": lambda: senet.create_model("vgg16_bn", num_classes=0),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return randomised(MODELS[request.param]())


def test_output_is_bit_identical_and_gradient_alive(model):
    original = copy.deepcopy(model)
    state = torch.get_rng_state()
    report = insert(model, example_input=X)
    assert torch.equal(state, torch.get_rng_state())
    assert report.identical is True
    assert all(p.gate_name == "identity_sigmoid" for p in blocks(model))
    with torch.no_grad():
        assert torch.equal(model.eval()(X), original.eval()(X))
    outputs = []
    for each in (original, model):
        torch.manual_seed(5)  # drop path and dropout must see the same random numbers
        outputs.append(each.train()(X))
    assert torch.equal(*outputs)
    buffers = zip(original.named_buffers(), model.named_buffers(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in buffers)
    model.eval()(X).square().mean().backward()
    assert all(block.fc2.weight.grad.abs().sum() > 0 for block in blocks(model))


def test_report_counts_what_was_added(model):
    before = sum(p.numel() for p in model.parameters())
    keys = set(model.state_dict())
    report = insert(model, example_input=X)
    assert sum(p.numel() for p in model.parameters()) - before == report.parameters
    assert set(model.state_dict()) - keys == set(report.keys)
    assert report.multiply_adds == sum(2 * p.channels * p.hidden for p in report.places)
    assert inserted_places(model) == report.places
    assert str(len(report.places)) in report.summary()


def test_remove_restores_structure_and_state(model):
    original = copy.deepcopy(model)
    insert(model, example_input=X)
    remove(model)
    assert repr(model) == repr(original)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )
    assert list(model.state_dict()) == list(original.state_dict())
    assert model.__dict__.keys() == original.__dict__.keys()
    with pytest.raises(UserError, match="nothing to remove"):
        remove(model)


def test_checkpoint_of_the_original_loads(model):
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    report = insert(model, example_input=X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    result = model.load_state_dict(saved, strict=False)
    assert set(result.missing_keys) == set(report.keys)
    assert not result.unexpected_keys
    with torch.no_grad():
        next(model.parameters()).add_(1)
    report.load_original(model, saved)
    assert torch.equal(next(model.parameters()), next(iter(saved.values())))
    with pytest.raises(UserError, match=r"does not fit: .* is missing"):
        report.load_original(model, dict(list(saved.items())[1:]))


def test_copies_have_their_own_working_gates(model):
    insert(model.eval(), example_input=X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    )
    with torch.no_grad():
        y = model(X)
        for each in copies:
            assert torch.equal(each(X), y)
            open_gates(each)
            assert not torch.allclose(each(X), y)
            assert torch.equal(model(X), y)


class Small(nn.Module):
    """A residual block, channels first, and one whose branch ends with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mlp = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(2), nn.Unflatten(2, (31, 31))
        )
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.norm(self.conv(x))
        return x + self.last(self.mlp(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_compiles_exports_and_traces():
    model = randomised(Small().eval())
    report = insert(model, example_input=X)
    assert [(p.module, p.channels_last) for p in report.places] == [("norm", False), ("last", True)]
    open_gates(model)
    with torch.no_grad():
        y = model(X)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), y)
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), y)
        torch.testing.assert_close(torch.jit.trace(model, X)(X), y)


@pytest.mark.parametrize("name", ["resnet50", "resnet20_cifar", "inception_v3", "mobilenet"])
def test_own_networks_become_their_twin(name):
    model = randomised(senet.create_model(name, num_classes=3)).eval()
    x = torch.randn(1, 3, 96, 96)
    report = insert(model, example_input=x, reduction=8)
    twin = senet.create_model(f"se_{name}", num_classes=3, reduction=8, gate="identity_sigmoid")
    expected = [n for n, m in twin.named_modules() if isinstance(m, senet.SqueezeExcitation)]
    assert sorted(place.block for place in report.places) == sorted(expected)
    assert model.config == twin.config
    twin.load_state_dict(open_gates(model).state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model(x))


def test_traced_places_are_those_of_the_twin():
    """The rules find in torchvision's ResNet-50 what se_resnet50 has by construction."""
    report = insert(torchvision.models.resnet50(), example_input=X)
    own = insert(senet.create_model("resnet50"), example_input=X)
    assert [p.module.removesuffix(".bn3") for p in report.places] == [p.module for p in own.places]
    for a, b in zip(report.places, own.places, strict=True):
        assert (a.stage, a.channels, a.hidden, a.calls) == (b.stage, b.channels, b.hidden, 1)


@pytest.mark.parametrize(
    ("build", "kind", "first", "count"),
    [
        (lambda: torchvision.models.mobilenet_v2(), "residual", "features.3.conv.3", 10),
        (lambda: torchvision.models.vgg16_bn(), "conv", "features.5", 5),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), "concat", "stage2.0", 16),
        (lambda: timm.create_model("res2net50_26w_4s"), "residual", "layer1.0.bn3", 16),
        (lambda: timm.create_model("repvgg_a0"), "conv", "stages.0.0.act", 21),
        (lambda: torchvision.models.convnext_tiny(), "residual", "features.1.0.block.6", 18),
    ],
)
def test_places_found(build, kind, first, count):
    report = insert(build(), example_input=X)
    assert {place.kind for place in report.places} == {kind}
    assert report.places[0].module == first
    assert len(report.places) == count


def test_layer_scale_and_drop_path_come_behind_se():
    model = timm.create_model("convnext_atto", num_classes=2, drop_path_rate=0.5)
    report = insert(model, example_input=X)
    assert report.places[0].module == "stages.0.blocks.0.mlp.fc2"


@pytest.mark.parametrize(("dims", "size"), [(1, (32,)), (2, (16, 16)), (3, (8, 8, 8))])
def test_any_number_of_dimensions(dims, size):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.norm = conv(3, 8, 1), conv(8, 8, 3, padding=1), norm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + F.dropout(self.norm(self.conv(x)), 0.5, self.training)

    model = Block()
    x = torch.randn(2, 3, *size)
    report = insert(model, example_input=x)
    assert [(p.module, p.kind, p.dims) for p in report.places] == [("norm", "residual", dims)]


class Pyramid(nn.Module):
    """A decoder that adds resized maps, and a block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.again = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(x)
        y = y + self.again(y)
        y = y + self.again(y)
        return x + F.interpolate(y, scale_factor=2)


def test_reused_blocks_share_one_se_and_resized_sums_get_none():
    report = insert(Pyramid(), example_input=X)
    assert [(p.module, p.calls) for p in report.places] == [("again.1", 2)]
    assert report.multiply_adds == 2 * 2 * 8 * 1


def test_names_predicates_stages_and_optimizers():
    model = torchvision.models.resnet18(num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = insert(
        model, where=["layer1", "layer3.0.conv1"], example_input=X, optimizers=optimizer
    )
    assert [p.block for p in report.places] == ["layer1_se", "layer3.0.conv1.se"]
    new = {id(p) for block in blocks(model) for p in block.parameters()}
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == new
    remove(model, optimizers=optimizer)
    assert len(optimizer.param_groups) == 1

    report = insert(model, where=lambda name, _: name.endswith("conv2"), example_input=X)
    assert len(report.places) == 8
    remove(model)
    report = insert(model, stages=(5,), example_input=X)
    assert [p.module for p in report.places] == ["layer4.0.bn2", "layer4.1.bn2"]
    remove(model)
    with pytest.raises(UserError, match=r"stages must be numbers out of \[2, 3, 4, 5\]"):
        insert(model, stages=(6,), example_input=X)


def test_other_gates_change_the_output_and_say_so():
    report = insert(torchvision.models.resnet18(), gate="sigmoid", example_input=X)
    assert report.identical is None


class Iterating(nn.Module):
    """Runs through its submodules: an inserted child is called as one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Iterating.Inner()
        self.head = nn.Linear(8, 2)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x) + 1
            return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def test_a_changed_output_is_undone():
    model = Iterating()
    before = repr(model)
    with pytest.raises(SenetError, match="taken out again"):
        insert(model, where=["conv"], example_input=X)
    assert repr(model) == before


def refused(model: nn.Module, match: str, **options: object) -> None:
    before = repr(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=match):
        insert(model, **{"example_input": X, **options})
    assert repr(model) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())


def test_refusals_name_the_remedy():
    resnet = torchvision.models.resnet18()
    refused(nn.Linear(3, 3), "does not take example_input of shape")
    refused(nn.Sequential(nn.Flatten(), nn.Linear(12288, 3)), "it has no convolutions")
    refused(resnet, "does not take example_input", example_input=torch.randn(2, 5, 64, 64))
    refused(resnet, "example_input is needed for ResNet", example_input=None)
    refused(resnet, "did you mean 'layer1.0.bn2'", where=["layer1.0.bn22"])
    refused(resnet, "where must be one of auto, residual, concat, conv", where="residuals")
    refused(resnet, "cannot follow 'fc'", where=["fc"])
    refused(resnet, "no place for SE found", where="concat")
    refused(resnet, "reduction must be positive", reduction=0)
    refused(resnet, "gate must be one of", gate="softmax")
    refused(resnet, "trains no parameter", optimizers=torch.optim.SGD(nn.Linear(1, 1).parameters()))
    refused(nn.DataParallel(resnet), r"insert into model\.module first")
    refused(torch.compile(resnet), r"insert before torch\.compile")
    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"):
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 1)))
    refused(scripted, r"insert before torch\.jit\.script")
    with pytest.raises(UserError, match="not initialised yet"):
        insert(nn.Sequential(nn.LazyConv2d(8, 1)), example_input=X)
    refused(torchvision.models.mobilenet_v3_small(), r"already has SE there: features.5.block.2")
    refused(timm.create_model("ghostnet_100"), "already has SE there")
    refused(senet.create_model("se_resnet8_cifar"), "insert into resnet8_cifar")
    insert(resnet, example_input=X)
    refused(resnet, r"already has SE blocks of senet\.insert")


def test_half_precision_models_get_half_precision_blocks():
    model = torchvision.models.resnet18().to(torch.bfloat16)
    insert(model, example_input=X.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Shared(nn.Module):
    """One ReLU for maps of 4 and of 8 channels, and a slot for SE that is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.relu, self.se = nn.ReLU(), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.wide(self.relu(self.narrow(x))))
        return y if self.se is None else self.se(y)


@pytest.mark.parametrize("where", [["relu"], lambda _, module: isinstance(module, nn.ReLU)])
def test_one_block_cannot_fit_calls_of_several_widths(where):
    model = Shared()
    refused(model, r"cannot follow 'relu': .* several channel numbers \(4, 8\)", where=where)
    assert not model.relu._forward_hooks
    assert insert(model, where=["wide"], example_input=X).identical


def test_rules_leave_out_modules_whose_calls_differ():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
            self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 8, 1)
            self.end = nn.ReLU()  # of both branches, and no convolution before it to follow

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = self.end(self.c(y) + 1) + y
            y = self.b(y)
            return self.end(self.d(y) + 1) + y

    model = Two()
    refused(model, "several channel numbers", where="residual")
    refused(model, "no place for SE found", where="residual")


@pytest.mark.parametrize("failing", ["twin", "traced", "optimizer", "attach"])
def test_a_failure_halfway_leaves_nothing_behind(failing, monkeypatch):
    small = failing in ("twin", "optimizer")
    model = senet.create_model("resnet8_cifar") if small else Shared()
    options = {} if small else {"where": ["narrow", "wide"]}
    before, config = repr(model), copy.deepcopy(getattr(model, "config", None))
    good, bad = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    module = sys.modules["senet.insertion.insert"]

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if failing == "optimizer":
        monkeypatch.setattr(bad, "add_param_group", fail)
    elif failing == "attach":
        calls = iter((module._hook, fail))
        monkeypatch.setattr(module, "_hook", lambda *each: next(calls)(*each))
    else:
        monkeypatch.setattr(module, "_revive", fail)
    with pytest.raises(KeyboardInterrupt):
        insert(model, example_input=X, optimizers=(good, bad), **options)
    monkeypatch.undo()
    assert repr(model) == before
    assert getattr(model, "config", None) == config
    assert not any(m._forward_hooks for m in model.modules())
    assert len(good.param_groups) == 1
    assert insert(model, example_input=X, **options).identical


def test_a_model_that_runs_no_more_is_undone():
    class Halving(Iterating.Inner):
        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():  # the block is one more, and gets half of its channels
                x = child(x if x is X else x[:, :8])[:, :8]
                x = torch.cat((x, x), 1)
            return x

    model = nn.Sequential(Halving())
    before = repr(model)
    with pytest.raises(SenetError, match="does not run with the SE blocks"):
        insert(model, where=["0"], gate="sigmoid", example_input=X)
    assert repr(model) == before


@separate_passes
def test_an_empty_slot_of_the_model_stays_empty():
    model = nn.Sequential(Shared())
    report = insert(model, where=["0"], example_input=X)
    assert [place.block for place in report.places] == ["0.inserted_se"]
    assert model[0].se is None
    open_gates(model)
    block = blocks(model)[0]
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    model(X)
    assert len(calls) == 1
    remove(model)
    assert list(dict(model.named_modules())) == ["", "0", "0.narrow", "0.wide", "0.relu"]

    taken = nn.Sequential(Shared())
    taken[0].se = nn.Identity()
    refused(taken, r"0\.se exists already", where=["0"])


@dataclass
class Output:
    """What networks return that PyTorch does not look into."""

    logits: Tensor
    name: str = "x"


class Own:
    """Nobody looks into this one."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returning(nn.Module):
    def __init__(self, result: Callable[[Tensor], object], noise: bool = False) -> None:
        super().__init__()
        self.conv, self.result, self.noise = nn.Conv2d(3, 8, 1), result, noise

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        return self.result(y + torch.rand(()) if self.noise else y)


@pytest.mark.parametrize(
    "result",
    [Output, lambda y: [Output(y), 3], lambda y: MappingProxyType({"a": y, "b": Output(y)})],
)
def test_outputs_are_compared_wherever_they_are(result):
    assert insert(Returning(result), where=["conv"], example_input=X).identical is True
    with pytest.raises(SenetError, match="output changed on insertion"):
        insert(Returning(result, noise=True), where=["conv"], example_input=X)


def test_what_cannot_be_compared_is_not_called_identical():
    report = insert(Returning(Own), where=["conv"], example_input=X)
    assert report.identical is None
    assert report.summary().endswith("output not compared")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stages": 3}, r"stages must be whole numbers, such as \(3, 4\), got 3"),
        ({"stages": "3"}, "stages must be whole numbers, .*, got '3'"),
        ({"stages": ()}, "stages must be whole numbers"),
        ({"where": None}, "where must be one of auto, .* got None"),
        ({"where": 5}, "where must be one of auto, .* got int"),
        ({"where": nn.ReLU}, "where must be one of auto, .* got type"),
        ({"where": nn.ReLU()}, "where must be one of auto, .* got ReLU"),
        ({"where": [["conv"]]}, r"the model has no module \['conv'\]"),
        ({"optimizers": None}, "optimizers must be torch optimizers, .* got None; leave it out"),
        ({"optimizers": [None]}, "optimizers must be torch optimizers, got NoneType"),
        ({"reduction": None}, "reduction must be positive, got None"),
        ({"gate": ["tanh"]}, "gate must be one of"),
    ],
)
def test_arguments_of_other_types_are_named(options, match):
    refused(Returning(Output), match, **options)


def test_names_may_come_from_a_generator():
    report = insert(Returning(Output), where=(n for n in ["conv"]), example_input=X)
    assert [place.module for place in report.places] == ["conv"]
