"""What timm's users reach for: the classifier, feature lists, gradient checkpointing, names."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import senet
from senet.errors import UserError
from senet.models import list_models as every_model
from senet.models.elsewhere import split_tag
from senet.networks.listing import list_models

SLOW = pytest.mark.soak
FAMILIES = (
    *("se_resnet18", "se_resnet8_cifar", "se_mobilenet", "se_bn_inception", "se_shufflenet_g3"),
    *(
        pytest.param(name, marks=SLOW)
        for name in ("se_resnet50", "se_inception_v3", "se_inception_resnet_v2", "se_vgg16_bn")
    ),
    pytest.param("se_shake_shake26_2x96d_cifar", marks=SLOW),
)
PEERS = (
    *("seresnet18", "legacy_seresnet18", "inception_v3"),
    pytest.param("vgg16_bn", marks=SLOW),
)


def pair(theirs: str, **options: Any) -> tuple[Any, Any]:
    """timm's network with our equal one."""
    torch.manual_seed(0)
    peer = timm.create_model(theirs, num_classes=5).eval()
    ours = senet.create_model(theirs, num_classes=5, **options)
    senet.load_weights(ours, peer.state_dict())
    return peer, ours.eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("theirs", PEERS)
@torch.no_grad()
def test_heads_and_maps_are_timms(theirs: str) -> None:
    peer, ours = pair(theirs)
    x = torch.randn(1, 3, *([96, 96] if theirs != "inception_v3" else [107, 107]))
    maps, expected = ours.forward_features(x), peer.forward_features(x)
    close(maps, expected)
    for pre_logits in (False, True):
        # timm's VGG gives small images no average, but stretches their maps.
        close(ours.forward_head(maps, pre_logits=pre_logits),
              peer.forward_head(expected, pre_logits=pre_logits))  # fmt: skip
    assert type(ours.get_classifier()) is type(peer.get_classifier()) is nn.Linear
    close(ours.get_classifier().weight, peer.get_classifier().weight)
    for model in (peer, ours):
        model.reset_classifier(7)
        assert model.get_classifier().weight.shape[0] == 7
        assert model.num_classes == 7
        assert model(x).shape == (1, 7)
    if theirs == "vgg16_bn":
        return  # theirs keeps its two layers of 4096 without a classifier
    for model in (peer, ours):
        model.reset_classifier(0)
        assert type(model.get_classifier()) is nn.Identity
    close(ours(x), peer(x))


@torch.no_grad()
def test_feature_lists_are_timms() -> None:
    for theirs, indices in (("seresnet18", (1, 2, 4)), ("inception_v3", (2, 3, 4))):
        peer, ours = pair(theirs)
        backbone = timm.create_model(theirs, features_only=True, out_indices=indices).eval()
        backbone.load_state_dict(peer.state_dict(), strict=False)
        found = senet.create_model(theirs, features_only=True, out_indices=indices).eval()
        found.load_state_dict(ours.state_dict(), strict=False)
        x = torch.randn(1, 3, 107, 107)
        for a, b in zip(found(x), backbone(x), strict=True):
            close(a, b)
        assert found.feature_info.channels() == backbone.feature_info.channels()
        assert found.feature_info.reduction() == backbone.feature_info.reduction()
        assert found.feature_info.out_indices == indices


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_has_them(name: str) -> None:
    model = senet.create_model(name, num_classes=3).eval()
    side = max(model.min_input_size, 32)
    x = torch.randn(1, 3, side, side)
    before = model.forward_features(x)
    model.classes, model.metrics = ("a", "b", "c"), {"top1": 1.0}
    for count in (4, 0, 6):
        model.reset_classifier(count, global_pool="avg")
        with torch.device("meta"):
            fresh = senet.create_model(name, num_classes=count)
        assert model.config == fresh.config
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in fresh.state_dict().items()
        }
        assert model(x).shape == (1, count or model.num_features)
        assert not any(module.training for module in model.modules())
        assert torch.equal(model.forward_features(x), before)
    assert model.classes is None
    assert model.metrics is None
    last = model.get_classifier()
    assert isinstance(last, nn.Linear)
    assert model.forward_head(before, pre_logits=True).shape == (1, last.in_features)
    close(last(model.forward_head(before, pre_logits=True)), model.forward_head(before))
    listed = senet.create_model(name, features_only=True, out_indices=2).eval()
    assert [m.shape[1] for m in listed(x)] == listed.feature_info.channels()
    assert len(listed.feature_info.channels()) == 2


def test_vgg_has_a_head_of_its_own() -> None:
    with torch.device("meta"):
        model = senet.create_model("vgg16_bn", num_classes=3)
        x = torch.empty(2, 512, 1, 1)
        assert model.forward_head(x, pre_logits=True).shape == (2, 4096)
        first = model.classifier[0]
        model.reset_classifier(5)
        assert model.classifier[0] is first
        assert model.forward_head(x).shape == (2, 5)
        model.reset_classifier(0)
        assert model.forward_head(x).shape == model.forward_head(x, pre_logits=True).shape
        model.reset_classifier(6)
        assert model.get_classifier() is model.classifier[-1]
        assert model.forward_head(x).shape == (2, 6)


def test_a_fresh_classifier_is_like_the_others() -> None:
    model = senet.create_model("se_resnet8_cifar", num_classes=3).to(torch.bfloat16)
    model.bn1.float()
    model.reset_classifier(0)
    model.reset_classifier(5)
    assert model.get_classifier().weight.dtype is torch.bfloat16
    assert model.bn1.weight.dtype is torch.float32
    with pytest.raises(UserError, match=r'global_pool must be None or "avg", got .max.'):
        model.reset_classifier(5, "max")
    with pytest.raises(UserError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1)
    aux = senet.create_model("inception_v3", aux=True, num_classes=3)
    aux.reset_classifier(4)
    assert aux.AuxLogits.fc.out_features == 4
    aux.reset_classifier(0)
    assert senet.models.Network.from_config(aux.config).AuxLogits is None


@pytest.mark.parametrize(
    ("indices", "said"),
    [((0, 1), "out of \\(1, 2, 3, 4\\)"), ((3, 2), "ascending"), (9, "got 9"), ((), "got \\(\\)")],
)
def test_indices_that_are_none(indices: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        senet.create_model("se_resnet18", features_only=True, out_indices=indices)
    with pytest.raises(UserError, match="give that too"):
        senet.create_model("se_resnet18", out_indices=(1,))
    last = senet.create_model("se_resnet18", features_only=True, out_indices=(-2, -1))
    assert last.feature_info.reduction() == [16, 32]


# --- gradient checkpointing --------------------------------------------------------------------


def trained(name: str, checkpointing: bool, **how: Any) -> dict[str, torch.Tensor]:
    """Logits, gradients, and running statistics of two steps."""
    torch.manual_seed(3)
    model = senet.create_model(name, num_classes=3, **how)
    model.set_grad_checkpointing(checkpointing)
    first = next(m for m in model.modules() if isinstance(m, _BatchNorm))
    first.momentum = None  # a cumulative average counts the batches
    side = max(model.min_input_size, 16)
    found = {}
    for step in range(2):
        x = torch.randn(3, 3, side, side).to(memory_format=torch.channels_last)
        y = model.to(memory_format=torch.channels_last)(x)
        y.square().sum().backward()
        found[f"logits{step}"] = y.detach()
    found |= {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    return found | {k: v.clone() for k, v in model.named_buffers()}


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_gradient_and_no_statistic(name: str) -> None:
    plain, saved = trained(name, False), trained(name, True)
    assert plain.keys() == saved.keys()
    for key, value in plain.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_frozen_batch_norms_and_other_places_of_se() -> None:
    for options in ({"integration": "pre"}, {"integration": "3x3"}, {"squeeze": "max"}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that it steps aside from the fused operator
            plain, saved = (trained("se_resnet8_cifar", on, **options) for on in (False, True))
        for key, value in plain.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-5, atol=1e-6, msg=key)
    model = senet.create_model("se_resnet8_cifar")
    model.set_grad_checkpointing()
    norm = model.layer2[0].bn1.eval()
    before = norm.running_mean.clone()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.track_running_stats
    assert model.layer1[0].bn1.track_running_stats


@contextmanager
def counted_saves() -> Iterator[list[int]]:
    """Counts the bytes kept for the backward pass."""
    kept = [0]

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[0] += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def test_checkpointing_keeps_less() -> None:
    x = torch.randn(4, 3, 32, 32)
    model = senet.create_model("se_resnet20_cifar")
    with counted_saves() as kept:
        model(x)
    whole = kept[0]
    model.set_grad_checkpointing()
    with counted_saves() as kept:
        model(x)
    assert kept[0] < whole / 2
    maps = senet.create_model("se_resnet20_cifar", features_only=True)
    maps.set_grad_checkpointing()
    with counted_saves() as kept:
        maps(x)
    assert kept[0] < whole / 2
    model.set_grad_checkpointing(False)
    with counted_saves() as kept:
        model(x)
    assert kept[0] == whole


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, on its compiler's settings
def test_checkpointing_compiles_in_one_graph() -> None:
    found = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = senet.create_model("se_resnet8_cifar", num_classes=3)
        model.set_grad_checkpointing(compiled)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(torch.randn(2, 3, 8, 8)).square().sum().backward()
        found[compiled] = {k: p.grad for k, p in model.named_parameters()} | {
            k: v.clone() for k, v in model.named_buffers()
        }
    for key, value in found[False].items():
        torch.testing.assert_close(found[True][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_hooks_on_a_stage_are_called() -> None:
    model = senet.create_model("se_resnet8_cifar")
    model.set_grad_checkpointing()
    seen = []
    model.layer2.register_forward_hook(lambda *arguments: seen.append("layer2"))
    model(torch.randn(1, 3, 8, 8))
    assert seen == ["layer2"]


# --- names -------------------------------------------------------------------------------------


def test_lists() -> None:
    assert list_models() == every_model()
    assert list_models(["vgg*", "se_vgg*"]) == ["se_vgg16_bn", "vgg16_bn"]
    assert list_models(module="mobilenet") == ["mobilenet", "se_mobilenet"]
    assert list_models("se_resnet*", module="resnet", exclude="*_cifar") == [
        *("se_resnet101", "se_resnet152", "se_resnet18", "se_resnet34", "se_resnet50")
    ]
    assert list_models("senet154", pretrained=True) == ["senet154.gluon_in1k", "senet154.in1k"]
    assert list_models("*.racm_in1k", pretrained=True) == ["se_resnext50_32x4d.racm_in1k"]
    assert list_models("*_cifar", pretrained=True) == []
    with pytest.raises(UserError, match=r"module must be one of inception_bn, .*got 'resnets'"):
        list_models(module="resnets")
    for name in list_models(pretrained=True):
        assert split_tag(name).name in every_model()


def test_names_of_timm() -> None:
    small = senet.create_model("seresnet18", num_classes=2)
    assert small.config["name"] == "se_resnet18"
    assert small.config["options"] == {"divisor": 8}
    assert senet.models.Network.from_config(small.config).layer1[0].se.hidden == 8
    old = senet.create_model("legacy_seresnet50", variant="torch", num_classes=2)
    assert old.config["options"] == {"variant": "torch"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet50d", r"timm's has another stem .*timm:resnet50d .*did you mean 'resnet50'"),
        ("seresnet33ts", "timm:seresnet33ts"),
        ("seresnext26t_32x4d", "timm:seresnext26t_32x4d"),
        ("mobilenetv1_100", "ReLU6.*did you mean 'mobilenet'"),
        ("mobilenetv3_large_100", "later MobileNet"),
        ("inception_v4", "another Inception.*'inception_v3'"),
        ("resnetv2_50", "another ResNet"),
        ("se_resnet5", "^unknown model 'se_resnet5'; did you mean 'se_resnet50'"),
        ("se_resnet50.ra2_in1k", "names weights too.*pretrained=True"),
    ],
)
def test_names_that_are_not_ours(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        senet.models.build_model(name)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("drop_rate", "dropout"),
        ("global_pool", "num_classes=0"),
        ("in_chans", "in_channels"),
        ("drop_path_rate", "drop_path"),
        ("checkpoint_path", "pretrained=PATH"),
    ],
)
def test_options_of_timm_are_answered(option: str, said: str) -> None:
    with pytest.raises(UserError, match=f"no option {option!r}: here that is .*{said}"):
        senet.create_model("se_resnet18", **{option: 1})
