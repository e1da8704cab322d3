"""Rewritten graphs compute what the model computes, in PyTorch and through the kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from senet.inference import optimize
from senet.inference.rewrite import Rewriter


class Sum(nn.Module):
    """Two convolutions and their input, put together by a function."""

    def __init__(self, together: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        return self.together(self.a(x), self.bn(self.b(x)), x)


SUMS = {
    "both": lambda a, b, x: torch.add(a, b, alpha=0.3),
    "first": lambda a, b, x: torch.add(a, x, alpha=0.3) * b,
    "second": lambda a, b, x: torch.add(x, a, alpha=-2.0) * b,
    "relu behind": lambda a, b, x: torch.relu(torch.add(a, b, alpha=-1)),
    "relu within": lambda a, b, x: torch.add(torch.relu(a), torch.relu(b), alpha=0.5),
    "alpha 1": lambda a, b, x: torch.add(a, b, alpha=1),
    "a difference": lambda a, b, x: a - b,
    "twice the same": lambda a, b, x: torch.add(a, a, alpha=0.5) + b,
    "in place": lambda a, b, x: torch.relu(a.add_(b)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    """`torch.add(a, b, alpha=k)` is a + k·b, whichever of them takes the sum in."""
    model, x = Sum(SUMS[name]).eval(), torch.randn(2, 8, 9, 9)
    wanted = model(x)
    torch.testing.assert_close(Rewriter(model).run()(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimize(model, x)(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_factor_goes_into_the_second_summands_convolution() -> None:
    rewriter = Rewriter(Sum(SUMS["both"]).eval())
    rewriter.run()
    assert ("b", "addition in the same pass") in rewriter.fused
