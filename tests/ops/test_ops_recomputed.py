"""Maps that a consumer's backward pass computes again instead of keeping them."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from senet import kernels, ops
from senet.nn.block import SqueezeExcitation
from senet.nn.tails import bn_relu, bn_relu_into, residual_tail

needs_kernels = pytest.mark.skipif(bool(kernels.MISSING), reason="needs the C++ kernels")


def parts(layout: torch.memory_format) -> tuple[Tensor, nn.BatchNorm2d]:
    torch.manual_seed(0)
    x = torch.randn(3, 20, 9, 7).contiguous(memory_format=layout).requires_grad_()
    bn = nn.BatchNorm2d(20)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    return x, bn


def results(
    call: Callable[[Tensor, nn.BatchNorm2d, nn.Module], Tensor],
    consumer: nn.Module,
    layout: torch.memory_format,
    training: bool,
) -> list[Tensor]:
    x, bn = parts(layout)
    out = call(x, bn.train(training), consumer)
    parameters = (*bn.parameters(), *consumer.parameters())
    return [out, *torch.autograd.grad(out.square().sum(), (x, *parameters))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("implementation", ["auto", "algebra", "reference"])
@pytest.mark.parametrize("kind", ["convolution", "pooling"])
def test_same_bits_as_with_the_map_kept(
    kind: str, implementation: str, layout: torch.memory_format, training: bool
) -> None:
    torch.manual_seed(1)
    consumer = nn.Conv2d(20, 8, 3) if kind == "convolution" else nn.MaxPool2d(3, 2, 1)
    with ops.use(implementation):
        found = results(bn_relu_into, consumer, layout, training)
        kept = results(lambda x, bn, c: c(bn_relu(x, bn)), consumer, layout, training)
    for a, b in zip(found, kept, strict=True):
        assert torch.equal(a, b)


@needs_kernels
def test_consumer_does_not_hold_the_map() -> None:
    x, bn = parts(torch.channels_last)
    conv = nn.Conv2d(20, 8, 3)
    y = bn_relu(x, bn)
    address = y.data_ptr()
    plain = conv(y)
    assert plain.grad_fn._saved_input.data_ptr() == address
    with ops.recomputed(y):
        out = conv(y)
    again = out.grad_fn._saved_input
    assert again.data_ptr() != address
    assert torch.equal(again, y)


@needs_kernels
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("training", [True, False])
def test_behind_an_activation(gated: bool, layout: torch.memory_format, training: bool) -> None:
    """BN → SiLU → SE: the same bits once more, and the consumer holds nothing."""
    conv = nn.Conv2d(20, 8, 3)
    w1, w2 = torch.randn(5, 20), torch.randn(20, 5)
    results = []
    for keeps in (True, False):
        x, bn = parts(layout)
        y = ops.bn_act_se(
            *(x, bn.weight, bn.bias, bn.running_mean, bn.running_var),
            *((w1, None, w2, None) if gated else (None,) * 4),
            training=training,
            momentum=0.1,
            eps=1e-5,
            activation="silu",
            hidden_activation="silu",
        )
        with nullcontext() if keeps else ops.recomputed(y):
            out = conv(y)
        again = out.grad_fn._saved_input
        assert (again.data_ptr() == y.data_ptr()) == keeps
        assert torch.equal(again, y)
        results.append(torch.autograd.grad(out.square().sum(), (x, *bn.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_kernels
def test_changed_input_is_refused() -> None:
    x, bn = parts(torch.channels_last)
    source = x * 1
    out = bn_relu_into(source, bn, nn.Conv2d(20, 8, 3))
    source.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_kernels
def test_twice_through_the_graph() -> None:
    x, bn = parts(torch.channels_last)
    loss = bn_relu_into(x, bn, nn.Conv2d(20, 8, 3)).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_leaves_other_decisions_on_what_is_kept_alone() -> None:
    """Under checkpoint and save_on_cpu, whose hooks must see every map."""
    conv = nn.Conv2d(20, 8, 3)

    def gradient(run: Callable[[Tensor, nn.BatchNorm2d], Tensor]) -> Tensor:
        x, bn = parts(torch.channels_last)
        return torch.autograd.grad(run(x, bn).square().sum(), x)[0]

    def block(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        return bn_relu_into(x, bn, conv)

    def checkpointed(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        return checkpoint(lambda x: block(x, bn), x, use_reentrant=False)

    seen: list[int] = []

    def observed(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        def pack(t: Tensor) -> Tensor:
            seen.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return block(x, bn)

    expected = gradient(block)
    assert torch.equal(gradient(checkpointed), expected)
    assert torch.equal(gradient(observed), expected)
    assert seen.count(3 * 20 * 9 * 7) == 2  # the operator's x and the convolution's input


@pytest.mark.parametrize("kind", ["shortcut", "gate", "no gradient", "foreign"])
def test_changes_nothing_for_other_maps(kind: str) -> None:
    x, bn = parts(torch.channels_last)
    if kind == "shortcut":
        y = residual_tail(x, x, bn)
    elif kind == "gate":
        y = residual_tail(x, None, bn, SqueezeExcitation(20, 4))
    elif kind == "foreign":
        y = x * 2
    else:
        y = bn_relu(x.detach(), bn.requires_grad_(False))
    conv = nn.Conv2d(20, 8, 3)
    with ops.recomputed(y):
        out = conv(y)
    assert out.grad_fn._saved_input.data_ptr() == y.data_ptr()
