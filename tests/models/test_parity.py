"""Logits equal those of timm and torchvision after copying the weights across."""

import re

import pytest
import timm
import torch
import torchvision
from torch import nn

import senet

SIZE = 97  # odd, so that the paddings of strided layers matter; not a multiple of any stride


def from_legacy(key: str, deep_stem: bool) -> str:
    """Name of a `legacy_se*` tensor in our network."""
    key = key.replace("last_linear.", "fc.").replace("se_module.", "se.")
    if deep_stem:
        stem = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4",
                "conv3": "conv1.6", "bn3": "bn1"}  # fmt: skip
        return re.sub(r"^layer0\.(\w+)\.", lambda match: f"{stem[match[1]]}.", key)
    return key.removeprefix("layer0.")


def randomise(model: nn.Module) -> None:
    """Batch norms as after training, so that a mixed-up one is seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1)
                module.bias.normal_(0, 0.1)


def load(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """1×1 convolutions and linear layers hold the same numbers in different shapes."""
    own = model.state_dict()
    assert state.keys() == own.keys()
    model.load_state_dict({key: state[key].reshape(own[key].shape) for key in own})


TIMM = [
    ("resnet50", "resnet50", {}),
    ("se_resnet50", "seresnet50", {}),
    ("se_resnext50_32x4d", "seresnext50_32x4d", {}),
    ("senet154", "senet154", {}),
    ("se_resnet50", "legacy_seresnet50", {"variant": "caffe"}),
    ("se_resnext50_32x4d", "legacy_seresnext50_32x4d", {"variant": "caffe"}),
    ("senet154", "legacy_senet154", {"variant": "caffe"}),
]


@pytest.mark.parametrize(("name", "peer_name", "options"), TIMM)
def test_timm(name, peer_name, options):
    peer = timm.create_model(peer_name, num_classes=7).eval()
    randomise(peer)
    model = senet.create_model(name, num_classes=7, **options).eval()
    state = peer.state_dict()
    if peer_name.startswith("legacy"):
        state = {from_legacy(key, "154" in name): tensor for key, tensor in state.items()}
    load(model, state)
    assert_same(model, peer)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision(name):
    peer = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    randomise(peer)
    model = senet.create_model(name, num_classes=7).eval()
    load(model, peer.state_dict())
    assert_same(model, peer)


def assert_same(model: nn.Module, peer: nn.Module) -> None:
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        logits, expected = model(x), peer(x)
    error = (logits - expected).norm() / expected.norm()
    assert expected.std() > 1e-3
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
