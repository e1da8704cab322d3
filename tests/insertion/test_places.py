"""Which sums are ends of residual branches, and which module of a branch SE follows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.errors import UserError
from senet.insertion.insert import insert

X = torch.randn(2, 3, 16, 16)


def convs(count: int) -> nn.Sequential:
    """Convolutions and ReLUs in turn, of 8 channels."""
    layers = [layer for _ in range(count) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Sum(nn.Module):
    """Two branches from one map, added; convolutions by number, none is the identity."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.first = convs(first) if first else nn.Identity()
        self.second = convs(second) if second else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.first(x) + self.second(x)


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [
        (2, 0, "first.2"),
        (0, 1, "second.0"),
        (3, 1, "first.4"),  # a projection
        (1, 2, "second.2"),
    ],
)
def test_the_longer_side_is_the_branch(first, second, place):
    report = insert(Sum(first, second), where="residual", example_input=X)
    assert [p.module for p in report.places] == [place]


@pytest.mark.parametrize("convolutions", [(1, 1), (2, 2), (3, 2), (2, 4)])
def test_a_sum_of_two_branches_is_none(convolutions):
    """Neither side is a shortcut: equal, or both of more than a projection."""
    with pytest.raises(UserError, match="no place for SE found"):
        insert(Sum(*convolutions), where="residual", example_input=X)


class LayerScale(nn.Module):
    """A factor a channel, computed in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8,), 0.5))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "product":
                return x * self.gamma.view(-1, 1, 1)
            case "in place":
                return x.mul_(self.gamma.view(-1, 1, 1))
            case "channels last":
                return (x.permute(0, 2, 3, 1) * self.gamma).permute(0, 3, 1, 2)
            case "einsum":
                return torch.einsum("nchw,c->nchw", x, self.gamma)
        return F.conv2d(x, self.gamma.view(-1, 1, 1, 1), groups=8)


class DropPath(nn.Module):
    """Drops whole branches in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1) < 0.5) if self.training else x


class Scaled(nn.Module):
    """A residual block whose branch ends in a layer scale and a drop path."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), LayerScale(way), DropPath()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.branch(x)


@pytest.mark.parametrize(
    ("way", "place"),
    [
        ("product", "branch.1"),
        ("in place", "branch.1"),
        ("channels last", "branch.1"),
        # Not known to be a factor: behind it then, but at the branch and not within the scale.
        ("einsum", "branch"),
        ("convolution", "branch"),
    ],
)
def test_no_se_follows_a_layer_scale(way, place):
    report = insert(Scaled(way), where="residual", example_input=X)
    assert [p.module for p in report.places] == [place]
