"""Tails are found in whatever modules they are written."""

from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from foreign_blocks import InlinedMBConv, RepVGGSE
from torch import Tensor, nn

import senet
from senet.anatomy.tails import Tail, tails


def forms(model: nn.Module, side: int = 64) -> Counter[str]:
    x = torch.zeros(1, 3, side, side, device="meta")
    return Counter(tail.form for tail in tails(model.to("meta"), x))


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (
            lambda: timm.create_model("seresnet18"),
            {"norm → relu → conv": 8, "norm → se → add → relu": 8, "norm → relu": 1},
        ),
        (
            lambda: torchvision.models.resnet18(),
            {"norm → relu → conv": 8, "norm → add → relu": 8, "norm → relu": 1},
        ),
        (
            lambda: timm.create_model("regnety_002"),
            {"norm → relu → conv": 13, "norm → relu → se → conv": 13, "norm → add → relu": 13}
            | {"norm → relu": 1},
        ),
        (
            lambda: torchvision.models.efficientnet_b0(),
            {"norm → silu → conv": 16, "norm → silu → se → conv": 16, "norm → add": 4}
            | {"norm → add → conv": 5, "norm": 5, "norm → conv": 2, "norm → silu": 1},
        ),
        (
            lambda: timm.create_model("lcnet_050"),
            {"norm → hardswish → conv": 24, "norm → hardswish → se → conv": 2}
            | {"norm → hardswish": 1},
        ),
        (
            lambda: senet.create_model("se_bn_inception"),
            {"norm → relu → conv": 31, "cat → se": 10, "norm → relu": 2},
        ),
        (
            lambda: senet.create_model("se_resnet164_cifar"),
            {"norm → relu → conv": 159, "norm → relu": 4},
        ),
        (  # batch norms with their statistics worked in
            lambda: torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d),
            {"affine → relu → conv": 8, "affine → add → relu": 8, "affine → relu": 1},
        ),
    ],
)
def test_forms(build, wanted: dict[str, int]) -> None:
    assert forms(build()) == wanted


def test_parts_name_modules_shortcuts_and_what_passes_in_evaluation() -> None:
    model = timm.create_model("seresnet18", drop_path_rate=0.1)
    found = {tail.name: tail for tail in tails(model, torch.zeros(1, 3, 64, 64))}
    identity, projected = found["layer1.1.bn2"], found["layer2.0.bn2"]
    assert [part.module for part in identity.parts] == [
        *("layer1.1.bn2", "layer1.1.se", "layer1.1", "layer1.1.act2")
    ]
    assert identity.excitation == "layer1.1.se"
    assert identity.source.calls[-1].name == "layer1.1.conv2"
    assert identity.shortcut is found["layer1.0.bn2"].parts[-1].node
    assert identity.shortcut_norm is None
    assert identity.parts[1].passed == ("layer1.1.drop_path",)
    assert projected.shortcut_norm.module == "layer2.0.downsample.1"
    assert "layer2.0.downsample.1" not in found, "the shortcut's batch norm is a part of the tail"
    assert [reader.name for reader in found["layer2.0.bn1"].readers] == ["conv2d"]


def test_concatenations_know_their_branches() -> None:
    found = tails(senet.create_model("se_bn_inception"))
    first = next(tail for tail in found if tail.form == "cat → se")
    assert len(first.branches) == 4
    assert all(isinstance(b, Tail) and b.form == "norm → relu" for b in first.branches)
    assert {b.name for b in first.branches}.isdisjoint(tail.name for tail in found)


class Written(nn.Module):
    """Everything as functions."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.mean, self.var = nn.Buffer(torch.zeros(16)), nn.Buffer(torch.ones(16))
        self.se = RepVGGSE(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.first(x), self.mean, self.var)
        return self.second(self.se(self.activation(x)))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: torch.clip(x, 0, 6), "relu6"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "gelu"),
        (lambda x: x * torch.tanh(F.softplus(x)), "mish"),
        (lambda x: F.relu(x) * 1.7, "mul of relu"),
        (F.softsign, "softsign"),
    ],
)
def test_activations_are_known_by_their_values(activation, name: str) -> None:
    (tail,) = tails(Written(activation), torch.zeros(1, 3, 8, 8))
    assert tail.form == f"norm → {name} → se → conv"


def test_code_inside_of_a_block() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), InlinedMBConv(16))
    assert [tail.form for tail in tails(model)] == ["norm → silu → se → conv", "norm → add"]


def test_what_others_read_ends_a_tail() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.bn(self.conv(x))
            return F.relu(y), y

    assert [tail.form for tail in tails(Read())] == ["norm"]
