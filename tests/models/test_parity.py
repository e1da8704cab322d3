"""Logits equal those of timm and torchvision, with weights that went through load_weights alone.

And back: `convert` gives the very tensors that came.
"""

import pytest
import timm
import torch
import torchvision
from torch import nn

import senet
from senet.weights import convert, load_weights, timm_name

SIZE = 97  # odd, so that the paddings of strided layers matter; not a multiple of any stride


def randomise(model: nn.Module) -> None:
    """Batch norms as after training, so that a mixed-up one is seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1)
                module.bias.normal_(0, 0.1)


# Name here, name there, options that load_weights must find out by itself.
CAFFE, CADENE, ROUNDED = {"variant": "caffe"}, {"variant": "cadene"}, {"divisor": 8}
TIMM = [
    ("se_resnet18", "legacy_seresnet18", CADENE),
    ("se_resnet34", "legacy_seresnet34", CADENE),
    ("se_resnet50", "legacy_seresnet50", CAFFE),
    ("se_resnet101", "legacy_seresnet101", CAFFE),
    ("se_resnet152", "legacy_seresnet152", CAFFE),
    ("se_resnext26_32x4d", "legacy_seresnext26_32x4d", CAFFE),
    ("se_resnext50_32x4d", "legacy_seresnext50_32x4d", CAFFE),
    ("se_resnext101_32x4d", "legacy_seresnext101_32x4d", CAFFE),
    ("senet154", "legacy_senet154", CAFFE),
    ("se_resnet18", "seresnet18", ROUNDED),
    ("se_resnet34", "seresnet34", ROUNDED),
    ("se_resnet50", "seresnet50", {}),
    ("se_resnet101", "seresnet101", {}),
    ("se_resnet152", "seresnet152", {}),
    ("se_resnext50_32x4d", "seresnext50_32x4d", {}),
    ("se_resnext101_32x4d", "seresnext101_32x4d", {}),
    ("senet154", "senet154", {}),
    ("resnet50", "resnet50", {}),
    ("inception_resnet_v2", "inception_resnet_v2", {}),
    ("inception_v3", "inception_v3", {}),
    ("vgg16_bn", "vgg16_bn", {}),
]


def test_every_legacy_network_of_timm_is_here():
    assert {peer for _, peer, _ in TIMM if peer.startswith("legacy_se")} == set(
        timm.list_models("legacy_se*")
    )


@pytest.mark.parametrize(("name", "peer_name", "changed"), TIMM)
def test_timm(name, peer_name, changed):
    peer = timm.create_model(peer_name, num_classes=7).eval()
    randomise(peer)
    model = senet.create_model(name, num_classes=7).eval()
    report = load_weights(model, peer.state_dict())
    assert report.changed == changed
    assert_same(model, peer)
    assert timm_name(model) == peer_name
    assert_equal_states(convert(model, "timm"), peer.state_dict())


TORCHVISION = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)] + [
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "vgg16_bn",
]


def test_every_resnet_of_torchvision_is_here():
    theirs = torchvision.models.list_models(include=["resnet*", "resnext*"])
    assert set(theirs) < set(TORCHVISION)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    peer = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    randomise(peer)
    model = senet.create_model(name, num_classes=7).eval()
    report = load_weights(model, peer.state_dict())
    assert (report.layout, report.changed, report.dropped) == ("torchvision", {}, ())
    assert_same(model, peer)
    assert_equal_states(convert(model, "torchvision"), peer.state_dict())


@pytest.mark.parametrize("aux", [False, True])
def test_torchvision_inception(aux):
    """Its auxiliary classifier is dropped, and said to be, or built with `aux=True`."""
    peer = torchvision.models.inception_v3(
        weights=None, num_classes=7, aux_logits=True, init_weights=False
    ).eval()
    randomise(peer)
    model = senet.create_model("inception_v3", num_classes=7, aux=aux).eval()
    report = load_weights(model, peer.state_dict())
    assert all(key.startswith("AuxLogits.") for key in report.dropped)
    assert (len(report.dropped) > 0) is not aux
    assert_same(model, peer)
    back = convert(model, "torchvision")
    expected = {k: v for k, v in peer.state_dict().items() if aux or "AuxLogits" not in k}
    assert_equal_states(back, expected)
    if aux:
        peer.train()
        model.train()
        for network in (peer, model):
            network.dropout.p = 0.0
            for module in network.modules():  # statistics of the batch, not updated
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        x = torch.randn(1, 3, 299, 299)
        with torch.no_grad():
            for ours, theirs in zip(model.forward_with_aux(x), peer(x), strict=True):
                assert (ours - theirs).norm() / theirs.norm() < 1e-5


def assert_equal_states(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def assert_same(model: nn.Module, peer: nn.Module) -> None:
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        logits, expected = model(x), peer(x)
    error = (logits - expected).norm() / expected.norm()
    assert expected.std() > 1e-3 * expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize(("channels", "hidden"), [(64, 4), (30, 7)])
def test_torchvision_block(channels, hidden):
    peer = torchvision.ops.SqueezeExcitation(channels, hidden)
    se = senet.SqueezeExcitation(channels, hidden=hidden)
    for ours, theirs in zip(se.parameters(), peer.parameters(), strict=True):
        with torch.no_grad():
            ours.copy_(theirs.reshape(ours.shape))
    x = torch.randn(3, channels, 9, 8)
    torch.testing.assert_close(se(x), peer(x), rtol=1e-5, atol=1e-6)
