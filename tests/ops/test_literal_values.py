"""Results that are known in whole numbers, without any other implementation.

A map's upper half is large and its lower half takes it away again; what is left are the ones that
were added here and there. Each partial sum of up to 1,024 elements is exact in float32, the sum of
the partial sums is not: the C++ kernels keep it in double precision.
"""

import pytest
import torch
from ops_cases import TRITON
from torch import Tensor

from senet import ops

pytestmark = pytest.mark.skipif(
    TRITON or not ops.implementations()["cpu"].available, reason="tests the C++ kernels"
)

LARGE = 8192.0  # 1,024 of them are 2^23
N, C, SIDE = 2, 8, 128
LAYOUTS = [torch.channels_last, torch.contiguous_format]
ONES = torch.arange(1.0, C + 1)  # a channel, in each image


def cancelling(layout: torch.memory_format) -> Tensor:
    pixels = SIDE * SIDE
    map_ = torch.full((N, C, pixels), LARGE)
    map_[:, :, pixels // 2 :] = -LARGE
    for c in range(C):
        map_[:, c, torch.arange(c + 1) * (pixels // 2 // C) + 7] += 1
    return map_.view(N, C, SIDE, SIDE).to(memory_format=layout)


def norm() -> ops.BatchNorm:
    """One that changes nothing, with parameters to learn."""
    weight, bias = torch.ones(C).requires_grad_(), torch.zeros(C).requires_grad_()
    return ops.BatchNorm(weight, bias, torch.zeros(C), torch.ones(C), 0.1, 0.0)


def assert_sums(*norms: ops.BatchNorm) -> None:
    """The dβ = Σ g and, where x is 1 everywhere, dγ = Σ g."""
    for each in norms:
        assert each.bias.grad.tolist() == (N * ONES).tolist()
        assert each.weight.grad.tolist() == (N * ONES).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shortcut", [False, True])
def test_gradients_of_a_tail(layout: torch.memory_format, shortcut: bool) -> None:
    g, first, second = cancelling(layout), norm(), norm()
    x = torch.ones_like(g)
    with ops.use("cpu"):
        y = ops.bn_se_add_relu(
            x,
            x if shortcut else None,
            *first[:4],
            training=False,
            momentum=0.1,
            eps=0.0,
            relu=False,
            shortcut_norm=second if shortcut else None,
        )
        y.backward(g)
    assert_sums(first, *([second] if shortcut else []))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_a_join(layout: torch.memory_format) -> None:
    g, norms = cancelling(layout), [norm(), norm()]
    x = torch.ones_like(g)
    with ops.use("cpu"):
        y = ops.bn_relu_concat_se([x, x], norms, training=[False, False])
        y.backward(torch.cat([g, g], 1).contiguous(memory_format=layout))
    assert_sums(*norms)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze(layout: torch.memory_format) -> None:
    """Gates that are P times the mean, channel by channel: the number of ones."""
    x = cancelling(layout)
    w1, w2 = SIDE * SIDE * torch.eye(C), torch.eye(C)
    with ops.use("cpu"):
        y = ops.squeeze_excite(x, w1, None, w2, None, gate="relu")
    assert torch.equal(y, x * ONES.view(-1, 1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_a_gate(layout: torch.memory_format) -> None:
    """dE/ds = Σ g ⊙ x: with gates of 1, the gradient of the second bias is that of the sums."""
    g = cancelling(layout)
    x = torch.ones_like(g)
    w1, w2 = torch.zeros(2, C), torch.zeros(C, 2)
    b2 = torch.ones(C).requires_grad_()
    with ops.use("cpu"):
        ops.squeeze_excite(x, w1, None, w2, b2, gate="relu").backward(g)
    assert b2.grad.tolist() == (N * ONES).tolist()
