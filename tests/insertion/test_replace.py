"""Taking an SE block out of its place, or putting another module there."""

from collections.abc import Callable

import pytest
import torch
from tests.helpers.marks import separate_passes
from torch import Tensor, nn

import senet
from senet.anatomy import excitations
from senet.gates.blocks import ConstantScale
from senet.insertion.replace import replace_block

GATE = "identity_sigmoid"


class Stranger(nn.Module):
    """A module that is not ours and calls its `se` always."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.se = senet.SqueezeExcitation(8, gate=GATE)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.conv(x))


def ours() -> nn.Module:
    return senet.create_model("se_resnet8_cifar", num_classes=3, gate=GATE)


def vgg() -> nn.Module:
    return senet.create_model("se_vgg16_bn", num_classes=0, gate=GATE)


def joined() -> nn.Module:
    return senet.create_model("se_bn_inception", num_classes=3, gate=GATE)


def inserted() -> nn.Module:
    model = nn.Sequential(Stranger(), nn.ReLU())
    replace_block(model, "0.se", None)
    senet.insert(model, where=["0.conv"], example_input=torch.zeros(1, 3, 8, 8))
    return model


def without_gates(model: nn.Module) -> nn.Module:
    """The gates of all blocks at 1, to the bit."""
    for block in excitations(model).values():
        nn.init.zeros_(block.module.fc2.weight)
        nn.init.zeros_(block.module.fc2.bias)
    return model


@separate_passes
@pytest.mark.parametrize("make", [ours, vgg, joined, inserted, Stranger])
@pytest.mark.parametrize("constant_first", [False, True])
def test_taken_out(make: Callable[[], nn.Module], constant_first: bool) -> None:
    model = without_gates(make()).eval()
    x = torch.randn(2, 3, 32, 32)
    names = list(excitations(model))
    assert names
    with torch.no_grad():
        expected = model(x)
        for name in names:
            channels = model.get_submodule(name).channels
            if constant_first:
                replace_block(model, name, ConstantScale(channels))
                torch.testing.assert_close(model(x), expected)
            replace_block(model, name, None)
        torch.testing.assert_close(model(x), expected)
    assert not excitations(model)
    assert not any(isinstance(module, ConstantScale) for module in model.modules())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_folded_blocks_are_removed_as_inserted_ones_are() -> None:
    """`remove` and folding leave the same: what a network that never had SE looks like."""
    plain = senet.create_model("resnet8_cifar", num_classes=3)
    model = senet.create_model("resnet8_cifar", num_classes=3)
    senet.insert(model)
    replace_block(model, "layer1.0.se", ConstantScale(16))
    senet.remove(model)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert vars(model.layer1[0])["se"] is None
    assert model.config == plain.config
