"""The padded shortcut beside a convolution against one after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from senet.nn.convolution import convolve
from senet.nn.padded_shortcut import PaddedShortcut, beside

STEPS = [(1, 7, 6), (2, 7, 6), (2, 4, 5)]


def pieces(step: int, height: int, width: int) -> tuple[PaddedShortcut, nn.Conv2d, Tensor]:
    generator = torch.Generator().manual_seed(step + height)
    layer = nn.Conv2d(3, 5, 3, step, 1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, height, width, generator=generator)
    return PaddedShortcut(3, 6, step), layer, x.contiguous(memory_format=torch.channels_last)


def gradients(y: Tensor, shortcut: Tensor, of: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    loss = sum((t * t * torch.randn(t.shape, generator=generator)).sum() for t in (y, shortcut))
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, of, **options)


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("wanted", ["both", "x", "weight"])
def test_same_bits_as_one_after_the_other(shape: tuple[int, int, int], wanted: str) -> None:
    shortcut, layer, x = pieces(*shape)
    x.requires_grad_(wanted != "weight")
    layer.weight.requires_grad_(wanted != "x")
    of = [t for t in (x, layer.weight) if t.requires_grad]
    both = beside(shortcut, layer, x)
    assert both is not None
    apart = layer(x), shortcut(x)
    for one, expected in zip(both, apart, strict=True):
        assert torch.equal(one, expected)
        assert one.is_contiguous(memory_format=torch.channels_last)
    for one, expected in zip(gradients(*both, of), gradients(*apart, of), strict=True):
        assert torch.equal(one, expected)


def test_either_output_alone_has_its_own_gradient() -> None:
    shortcut, layer, x = pieces(2, 7, 6)
    x.requires_grad_()
    for i in range(2):
        both = beside(shortcut, layer, x)
        assert both is not None
        (found,) = torch.autograd.grad(both[i].square().sum(), x)
        (expected,) = torch.autograd.grad((layer(x), shortcut(x))[i].square().sum(), x)
        assert torch.equal(found, expected)


def test_second_derivatives() -> None:
    shortcut, layer, x = pieces(2, 7, 6)
    of = [x.requires_grad_(), layer.weight]
    found = []
    for both in (beside(shortcut, layer, x), (layer(x), shortcut(x))):
        assert both is not None
        first = gradients(*both, of, create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), of))
    for one, expected in zip(*found, strict=True):
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-5)


def test_the_gradients_that_arrive_stay_as_they_are() -> None:
    shortcut, layer, x = pieces(2, 7, 6)
    both = beside(shortcut, layer, x.requires_grad_())
    assert both is not None
    given = [torch.randn_like(t) for t in both]
    kept = [t.clone() for t in given]
    torch.autograd.grad(both, [x], given)
    assert all(map(torch.equal, given, kept))


class Own(PaddedShortcut):
    """Somebody's own."""


@pytest.mark.parametrize(
    "change",
    [
        lambda shortcut, layer, x: (None, layer, x),
        lambda shortcut, layer, x: (Own(3, 6, 2), layer, x),
        lambda shortcut, layer, x: (shortcut, nn.Sequential(layer), x),
        lambda shortcut, layer, x: (shortcut, nn.Conv2d(3, 5, 3, 2, 1), x),
        lambda shortcut, layer, x: (shortcut, layer, x.contiguous()),
        lambda shortcut, layer, x: (shortcut, layer.double(), x.double()),
        lambda shortcut, layer, x: (hooked(shortcut), layer, x),
        lambda shortcut, layer, x: (shortcut, hooked(layer), x),
    ],
)
def test_what_is_done_one_after_the_other(
    change: Callable[[nn.Module, nn.Module, Tensor], tuple[nn.Module, nn.Module, Tensor]],
) -> None:
    assert beside(*change(*pieces(2, 7, 6))) is None


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def test_transforms_and_autocast_are_left_alone() -> None:
    shortcut, layer, x = pieces(2, 7, 6)

    def each(one: Tensor) -> Tensor:
        assert beside(shortcut, layer, one[None]) is None
        return convolve(layer, one[None])[0]

    torch.func.vmap(each)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert beside(shortcut, layer, x) is None
