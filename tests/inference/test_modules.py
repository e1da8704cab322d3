"""The algebra of inference in plain PyTorch, against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from senet.inference.modules import FusedConv, Pointwise, SqueezeGate
from senet.nn.block import SqueezeExcitation
from senet.ops.activations import ACTIVATIONS, Activation

# kernel, padding, dilation; height and width of the input are 13 and 9
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (2, 2)),
    ((3, 3), (1, 1), (2, 2)),
    ((3, 3), (0, 0), (2, 3)),
    ((3, 2), (4, 1), (3, 2)),
    ((1, 5), (0, 2), (1, 2)),
    ((1, 1), (1, 2), (1, 1)),
    ((5, 1), (9, 0), (2, 1)),  # a tap that sees the border only
]


@torch.no_grad()
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gates_are_those_of_the_convolutions_output(geometry: tuple, bias: bool) -> None:
    """What the kernel does not see of the border counts for each tap, dilated or not."""
    kernel, padding, dilation = geometry
    conv = nn.Conv2d(6, 10, kernel, padding=padding, dilation=dilation, bias=bias)
    se = SqueezeExcitation(10, hidden=4, bias=bias)
    nn.init.normal_(se.fc2.weight)
    x = torch.randn(3, 6, 13, 9)
    found = SqueezeGate(se, FusedConv(conv))(x)
    conv, se = conv.double(), se.double()
    means = conv(x.double()).mean((2, 3))
    wanted = torch.sigmoid(se.fc2(torch.relu(se.fc1(means))))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_fused_convolution_ends_in_any_activation(name: str) -> None:
    """y = δ(gates ⊙ conv(x) + shortcut), with gates (N,C) or (N,C,1,1)."""
    conv = FusedConv(nn.Conv2d(3, 4, 1))
    conv.activation = Activation(name, 0.3)
    x, gates, shortcut = torch.randn(2, 3, 5, 5), torch.rand(2, 4), torch.randn(2, 4, 5, 5)
    inner = gates[:, :, None, None] * F.conv2d(x, conv.weight, conv.bias) + shortcut
    wanted = ACTIVATIONS[name](inner, 0.3)
    for given in (gates, gates[:, :, None, None]):
        torch.testing.assert_close(conv(x, given, shortcut), wanted)
    alone = Pointwise()
    alone.activation = conv.activation
    torch.testing.assert_close(alone(shortcut), ACTIVATIONS[name](shortcut, 0.3))


@torch.no_grad()
def test_slopes_are_those_of_a_prelu() -> None:
    prelu, x = nn.PReLU(4), torch.randn(2, 4, 5, 5)
    nn.init.uniform_(prelu.weight, -1, 1)
    alone = Pointwise()
    alone.slopes = prelu.weight
    assert torch.equal(alone(x), prelu(x))
