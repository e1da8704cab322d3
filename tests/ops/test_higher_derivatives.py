"""Derivatives of derivatives, and torch.func's transforms, through every implementation."""

from collections.abc import Callable

import join_cases
import ops_cases
import pytest
import torch
from join_cases import Join
from ops_cases import PARAMETERS, Case, parts
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from senet import kernels, ops
from senet.errors import UserError
from senet.nn.block import SqueezeExcitation

WAYS = ["algebra", *([] if kernels.MISSING else ["cpu"])]
SMALL = {"N": 2, "C": 3, "spatial": (2, 2), "hidden": 2, "dtype": torch.float64}


def of_numbers(
    numbers: dict[str, Tensor],
    wanted: tuple[str, ...],
    apply: Callable[[dict[str, Tensor]], Tensor],
    way: str,
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """y as a function of some of the numbers, without their running statistics moving."""

    def y(*tensors: Tensor) -> Tensor:
        given = {k: t.clone() for k, t in numbers.items()} | dict(zip(wanted, tensors, strict=True))
        with ops.use(way):
            return apply(given)

    return y, tuple(numbers[name].detach().requires_grad_() for name in wanted)


def used(case: Case) -> tuple[str, ...]:
    """Names of the differentiable inputs that a case reads."""
    unused = [] if case.gated else ["w1", "b1", "w2", "b2"]
    unused += ["shortcut_weight", "shortcut_bias"] if case.shortcut != "normalized" else []
    unused += ["shortcut"] if case.shortcut == "none" else []
    return tuple(name for name in ("x", "shortcut", *PARAMETERS) if name not in unused)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", list(parts(**SMALL)), ids=str)
def test_second_derivatives_of_the_tail(case: Case, way: str) -> None:
    y, tensors = of_numbers(
        ops_cases.inputs(case), used(case), lambda t: ops_cases.apply(t, case), way
    )
    assert gradgradcheck(y, tensors, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shortcut", ops_cases.SHORTCUTS)
def test_second_derivatives_of_another_activation(shortcut: str, way: str) -> None:
    case = Case(**SMALL, shortcut=shortcut, activation="silu")
    y, tensors = of_numbers(
        ops_cases.inputs(case), used(case), lambda t: ops_cases.apply(t, case), way
    )
    assert gradgradcheck(y, tensors, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", ops.GATES)
def test_second_derivatives_of_gates(gate: str, way: str) -> None:
    case = Case(**SMALL, gate=gate, shortcut="none", relu=False)
    y, tensors = of_numbers(
        ops_cases.inputs(case), used(case), lambda t: ops_cases.apply(t, case), way
    )
    assert gradgradcheck(y, tensors, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gated", [True, False])
def test_second_derivatives_of_the_join(gated: bool, way: str) -> None:
    case = Join("brn", (2, 3, 2), N=2, spatial=(2, 2), hidden=2, gated=gated, dtype=torch.float64)
    numbers = join_cases.numbers(case)
    wanted = tuple(
        name
        for name in numbers
        if not name.startswith(("mean", "var", "y", "weight2", "bias2"))
        and (gated or name not in ("w1", "b1", "w2", "b2"))
    )
    y, tensors = of_numbers(numbers, wanted, lambda t: join_cases.apply(t, case), way)
    assert gradgradcheck(y, tensors, atol=1e-6, fast_mode=True)


def block() -> SqueezeExcitation:
    return SqueezeExcitation(4, 2).double()


def penalty(se: nn.Module, x: Tensor, way: str, *, recompute: bool = False) -> list[Tensor]:
    """Gradients of a gradient penalty behind a linear head, whose gradient needs none itself."""
    x = x.clone().requires_grad_()
    with ops.use(way):
        y = checkpoint(se, x, use_reentrant=False) if recompute else se(x)
        (g,) = torch.autograd.grad(y.mean((2, 3)).sum(), x, create_graph=True)
        return list(torch.autograd.grad((g**2).sum(), [*se.parameters(), x]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_penalty_trains_the_gates(way: str, recompute: bool) -> None:
    se, x = block(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = penalty(se, x, "reference")
    for found, wanted in zip(penalty(se, x, way, recompute=recompute), expected, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_one_tensor_in_two_places_counts_twice(way: str) -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def second(way: str) -> Tensor:
        with ops.use(way):
            y = ops.squeeze_excite(x, w, None, w, None)
            (g,) = torch.autograd.grad((y**2).sum(), w, create_graph=True)
            return torch.autograd.grad((g**2).sum(), w)[0]

    torch.testing.assert_close(second(way), second("reference"))


def test_running_statistics_move_once() -> None:
    case = Case(**SMALL)
    t = ops_cases.inputs(case)
    before = t["running_mean"].clone()
    t["x"].requires_grad_()
    y = ops_cases.apply(t, case)
    moved = t["running_mean"].clone()
    (g,) = torch.autograd.grad(y.sum(), t["x"], create_graph=True)
    g.sum().backward()
    assert not torch.equal(before, moved)
    assert torch.equal(t["running_mean"], moved)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # its own use
def test_transforms_of_torch_func() -> None:
    se, x = block(), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    parameters = dict(se.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return (functional_call(se, parameters, (image[None],)) ** 2).sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        se.zero_grad()
        (se(image[None]) ** 2).sum().backward()
        torch.testing.assert_close(per_sample["fc1.weight"][i], se.fc1.weight.grad)
    with ops.use("reference"):
        _, expected = torch.autograd.functional.jvp(se, x, torch.ones_like(x))
        full = torch.autograd.functional.jacobian(se, x)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(jvp(se, (x,), (torch.ones_like(x),))[1], expected)
    torch.testing.assert_close(jacrev(se)(x), full)
    torch.testing.assert_close(jacfwd(se)(x), full)
    assert hessian(lambda x: se(x).sum())(x).shape == (*x.shape, *x.shape)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(forward_ad.unpack_dual(se(dual)).tangent, expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_chosen_implementation_refuses_transforms_in_one_line(way: str) -> None:
    with ops.use(way), pytest.raises(UserError, match=r'use\("auto"\) or "reference"'):
        vmap(block())(torch.randn(2, 1, 4, 2, 2, dtype=torch.float64))
