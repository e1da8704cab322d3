"""Shortcuts of residual blocks."""

import torch

from senet.nn.padded_shortcut import PaddedShortcut


def test_padded_shortcut() -> None:
    """Every second position, and the new channels half before and half behind, as on CIFAR."""
    x = torch.arange(2 * 5 * 4.0).view(1, 2, 5, 4) + 1
    out = PaddedShortcut(2, 6, 2)(x)
    assert out.shape == (1, 6, 3, 2)
    assert out[0, 2].tolist() == [[1, 3], [9, 11], [17, 19]]
    assert out[0, 3].tolist() == [[21, 23], [29, 31], [37, 39]]
    assert not out[0, [0, 1, 4, 5]].any()
    one_more = PaddedShortcut(2, 5, 1)(x)
    assert torch.equal(one_more[:, 1:3], x)
    assert not one_more[0, [0, 3, 4]].any()


def test_padded_shortcut_keeps_the_memory_order_and_sends_its_gradient_back() -> None:
    x = torch.randn(2, 3, 7, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = PaddedShortcut(3, 5, 2)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    assert torch.equal(x.grad[:, :, ::2, ::2], gradient[:, 1:4])
    assert x.grad.count_nonzero() == gradient[:, 1:4].numel()
