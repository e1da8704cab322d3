"""The depthwise convolution: forward and both gradients against the oracle and PyTorch's own."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_cases import DEVICE
from test_ops_operators import NON_LEAF
from tolerances import error
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from senet import ops
from senet.errors import UserError

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="C++ kernels")
IMPLEMENTATIONS = ("algebra", "cpu")
# Sums of k² products forward, of all images' positions for the weights, of which those of a band
# are kept in float32: as with the other operators' maps and channels.
MAPS, CHANNELS = 3e-6, 1e-5


def inputs(
    N: int = 2, C: int = 21, side: tuple[int, int] = (9, 11), k: int = 3
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(k)
    x = torch.randn(N, C, *side, generator=draw) + 0.3
    weight = torch.randn(C, 1, k, k, generator=draw) / k
    return x.contiguous(memory_format=torch.channels_last), weight


def run(implementation: str, x: Tensor, weight: Tensor, *options: int) -> list[Tensor]:
    """y and both gradients, for a gradient of y that is the same everywhere."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    with ops.use(implementation):
        y = ops.depthwise(x, weight, *options)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
        y.backward(g)
    return [y.detach(), x.grad, weight.grad]


def assert_as_the_oracle(implementation: str, x: Tensor, weight: Tensor, *options: int) -> None:
    found = run(implementation, x, weight, *options)
    expected = run("reference", x.double(), weight.double(), *options)
    for a, b, bound in zip(found, expected, (MAPS, MAPS, CHANNELS), strict=True):
        assert a.shape == b.shape
        assert error(a, b) <= bound, (tuple(x.shape), tuple(weight.shape), options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [3, 5, 7])
def test_strides_paddings_and_sizes(implementation: str, k: int) -> None:
    for side, stride, padding in product(
        [(9, 11), (7, 7), (14, 13), (1, 1), (2, 20)], (1, 2, 3), (0, 1, k // 2, k)
    ):
        if min(side) + 2 * padding >= k:
            assert_as_the_oracle(implementation, *inputs(side=side, k=k), stride, padding)


@pytest.mark.parametrize("C", [1, 8, 16, 24, 72, 96, 641])
def test_channels(C: int) -> None:
    """Vectors, halves of one, what is left; blocks of channels."""
    for k, stride in ((3, 1), (5, 2)):
        assert_as_the_oracle("cpu", *inputs(C=C, side=(12, 12), k=k), stride, k // 2)


def test_many_images_and_bands() -> None:
    assert_as_the_oracle("cpu", *inputs(N=7, C=16, side=(40, 65)), 1, 1)


def test_the_oracle_is_pytorchs_convolution() -> None:
    x, weight = (t.double() for t in inputs(k=5))
    for stride, padding in product((1, 2), (0, 2)):
        with ops.use("reference"):
            found = ops.depthwise(x, weight, stride, padding)
        torch.testing.assert_close(found, F.conv2d(x, weight, None, stride, padding, groups=21))


def test_layouts() -> None:
    """channels_last stays so; other maps, types and kernels go to PyTorch's own convolution."""
    x, weight = inputs()
    y = ops.depthwise(x, weight, 1, 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert type(ops.depthwise(x, weight.requires_grad_(), 1, 1).grad_fn).__name__ != (
        "ConvolutionBackward0"
    )
    _, other = inputs(k=4)
    for maps, kernel in ((x.contiguous(), weight), (x.double(), weight.double()), (x, other)):
        y = ops.depthwise(maps, kernel.requires_grad_(), 1, 1)
        assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
        expected = F.conv2d(maps, kernel, None, 1, 1, groups=21)
        assert torch.equal(y, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.depthwise(x, weight, 1, 1).dtype == torch.bfloat16


def test_gradients_that_are_not_wanted() -> None:
    x, weight = inputs()
    whole = run("cpu", x, weight, 2, 1)
    g = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(9))
    for frozen in (0, 1):
        leaves = [t.detach().clone().requires_grad_(i != frozen) for i, t in enumerate((x, weight))]
        ops.depthwise(*leaves, 2, 1).backward(g)
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, whole[2 - frozen])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weight = inputs(N=5, C=72, side=(30, 31), k=5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run("cpu", x, weight, 1, 2))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@NON_LEAF
def test_opcheck() -> None:
    x, weight = (t.requires_grad_() for t in inputs())
    opcheck(torch.ops.senet.depthwise.default, (x, weight, 2, 1))
    with torch.no_grad():
        y, packed = torch.ops.senet.depthwise(x, weight, 2, 1)
    saved = (x.detach(), weight.detach(), packed, 2, 1)
    arguments = (torch.randn_like(y), *saved, [True, True])
    opcheck(torch.ops.senet.depthwise_backward.default, arguments)
    opcheck(torch.ops.senet.depthwise.default, (x, inputs(k=2)[1], 1, 0))


def test_gradients_of_gradients() -> None:
    """By the oracle, in the kernels' own precision against float64."""
    x, weight = inputs(C=2, side=(4, 4))

    def second(x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = ops.depthwise(x, weight, 1, 1)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(dx.square().sum(), weight)
        return found

    assert error(second(x, weight), second(x.double(), weight.double())) < CHANNELS


def test_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    x, weight = inputs()
    compiled = torch.compile(ops.depthwise, fullgraph=True, backend="aot_eager")
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    for f, leaf in zip((ops.depthwise, compiled), leaves, strict=True):
        f(x, leaf, 1, 1).square().sum().backward()
    assert error(leaves[1].grad, leaves[0].grad) <= 1e-6


def test_no_images_and_flops() -> None:
    x, weight = inputs(N=0)
    weight.requires_grad_()
    y = ops.depthwise(x, weight, 1, 1)
    assert y.shape == x.shape
    y.sum().backward()
    assert not weight.grad.any()
    x, weight = (t.requires_grad_() for t in inputs(N=2, C=21))
    with FlopCounterMode(display=False) as counted:
        ops.depthwise(x, weight, 1, 1).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 2 * 21 * 9 * 11 * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, r"x has shape \(3, 4, 5\); it must be"),
        ({"weight": torch.zeros(21, 2, 3, 3)}, r"for an input of 21 channels it must be \(21, 1"),
        ({"weight": torch.zeros(21, 1, 3, 5)}, r"weight has shape"),
        ({"stride": 0}, "stride is 0, padding 1"),
        ({"weight": torch.zeros(21, 1, 15, 15)}, "a kernel of 15 is larger than the input"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    x, weight = inputs()
    with pytest.raises(UserError, match=message):
        ops.depthwise(**{"x": x, "weight": weight, "stride": 1, "padding": 1, **change})
