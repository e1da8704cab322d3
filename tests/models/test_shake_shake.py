"""Shake-Shake's random mixtures: distribution, independence, evaluation."""

import pytest
import torch

import senet
from senet.models.shake_shake import ShiftedShortcut, mix


def coefficients(n, backward):
    """α and β of n images, read off a mixture of ones with zeros."""
    a = torch.ones(n, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(n, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    out = mix(a, b, backward)
    out.sum().backward()
    assert (out == out[:, :1, :1, :1]).all()  # one weight an image
    torch.testing.assert_close(a.grad + b.grad, torch.ones_like(b))
    return out[:, 0, 0, 0].detach(), a.grad[:, 0, 0, 0]


def test_forward_and_backward_weights_are_uniform_and_independent():
    n = 20_000
    alpha, beta = coefficients(n, "shake")
    for weight in (alpha, beta):
        assert 0 <= weight.min() < 0.001
        assert 0.999 < weight.max() <= 1
        # Five standard errors of mean and variance of a uniform distribution.
        assert weight.mean().item() == pytest.approx(1 / 2, abs=5 * (1 / 12 / n) ** 0.5)
        assert weight.var().item() == pytest.approx(1 / 12, abs=5 * (1 / 180 / n) ** 0.5)
    correlation = torch.corrcoef(torch.stack([alpha, beta]))[0, 1]
    assert abs(correlation.item()) < 5 / n**0.5
    assert (alpha != beta).any()


def test_even_takes_a_half_in_the_backward_pass():
    alpha, beta = coefficients(1000, "even")
    assert alpha.std() > 0.25
    assert torch.equal(beta, torch.full_like(beta, 0.5))


def test_forward_mixes_both_branches():
    a, b = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    torch.manual_seed(3)
    alpha = torch.rand(4, 1, 1, 1)
    torch.manual_seed(3)
    torch.testing.assert_close(mix(a, b, "shake"), alpha * a + (1 - alpha) * b)


@pytest.mark.parametrize("name", ["shake_shake26_2x96d_cifar", "shake_even29_2x4x64d_cifar"])
def test_random_in_training_and_a_half_in_evaluation(name):
    block = senet.create_model(name, num_classes=2).layer1[1]
    block.requires_grad_(False)
    for branch in (block.branch1, block.branch2):
        branch.eval()  # so that batch norm is the same in both modes
    x = torch.randn(2, block.branch1.conv1.in_channels, 5, 5)
    a, b = (branch(torch.relu(x)) for branch in (block.branch1, block.branch2))
    assert not torch.equal(block(x), block(x))
    block.eval()
    torch.testing.assert_close(block(x), x + (a + b) / 2)


def test_shortcut_sees_odd_positions_in_half_of_its_channels():
    shortcut = ShiftedShortcut(1, 2, 2).eval()
    torch.nn.init.ones_(shortcut.conv1.weight)
    torch.nn.init.ones_(shortcut.conv2.weight)
    x = torch.arange(25.0).view(1, 1, 5, 5)
    out = shortcut(x)
    scale = (1 + shortcut.bn.eps) ** -0.5
    torch.testing.assert_close(out[0, 0], x[0, 0, ::2, ::2] * scale)
    odd = torch.zeros(3, 3)
    odd[:2, :2] = x[0, 0, 1::2, 1::2]
    torch.testing.assert_close(out[0, 1], odd * scale)
