"""BN → activation → SE: numbers and gradients of every implementation, PyTorch's own modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from join_cases import Join, apply, numbers, oracle, run
from ops_cases import CPP, FAST, IMPLEMENTATIONS, KERNELS, LAYOUTS
from test_ops_operators import NON_LEAF
from tolerances import assert_close, error
from torch import Tensor, nn
from torch.library import opcheck

from senet import ops
from senet.errors import UserError
from senet.ops import BRANCH_ACTIVATIONS, GATES, HIDDEN_ACTIVATIONS
from senet.ops.algebra.common import through
from senet.ops.join import NONE, Arguments
from senet.ops.operators import JOIN

DIFFERENTIATED = ("x0", "weight0", "bias0", "w1", "b1", "w2", "b2")
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
}


def case(**fixed: Any) -> Join:
    return Join(**{"kinds": "b", "channels": (21,), "activation": "silu", **fixed})


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("activation", BRANCH_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_activation(implementation: str, activation: str, dtype: torch.dtype) -> None:
    for kinds in ("b", "r"):
        for hidden in HIDDEN_ACTIVATIONS:
            for gated in (True, False):
                c = case(
                    kinds=kinds,
                    activation=activation,
                    hidden_activation=hidden,
                    gated=gated,
                    dtype=dtype,
                )
                assert_close(run(implementation, c), oracle(c), c.dtype, c)
                if not gated:
                    break


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_layouts_and_gates(implementation: str, layout: str, activation: str) -> None:
    for gate in GATES:
        c = case(layout=layout, gate=gate, activation=activation, hidden_activation="silu")
        assert_close(run(implementation, c), oracle(c), c.dtype, c)
    c = case(layout=layout, activation=activation, affine=False, biases=False)
    assert_close(run(implementation, c), oracle(c), c.dtype, c)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "sizes",
    [
        {"spatial": (1, 1), "N": 6},
        {"spatial": (27, 40), "N": 1, "channels": (96,)},  # several tasks
        {"spatial": (9,)},
        {"spatial": (3, 4, 5)},
        {"channels": (1,)},  # channels_last and contiguous at once
        {"channels": (72,), "spatial": (8, 8), "hidden": 40},  # vectors and half a vector
        {"channels": (641,), "spatial": (8, 8), "hidden": 40},
        {"spatial": (64, 64), "channels": (128,), "N": 5},  # groups of images
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_shapes(implementation: str, sizes: dict[str, Any], layout: str) -> None:
    for activation in ("hardswish", "silu"):
        c = case(**sizes, layout=layout, activation=activation, hidden_activation="hardswish")
        assert_close(run(implementation, c), oracle(c), c.dtype, c)


@pytest.mark.parametrize("activation", BRANCH_ACTIVATIONS)
def test_as_the_modules(activation: str) -> None:
    """As torch's own modules: the names mean what they mean there."""
    c = case(activation=activation, hidden_activation="silu")
    t = numbers(c)
    leaves = {name: t[name].clone().requires_grad_() for name in ("x0", "weight0", "w1", "w2")}
    given = {**t, **leaves}
    y = apply(given, c)
    y.backward(t["y"])
    bn = nn.BatchNorm2d(21, eps=1e-3, momentum=0.2)
    bn.weight.data, bn.bias.data = t["weight0"].clone(), t["bias0"].clone()
    x = t["x0"].clone().requires_grad_()
    v = MODULES[activation]()(bn(x))
    w1, w2 = (t[name].clone().requires_grad_() for name in ("w1", "w2"))
    s = F.linear(F.silu(F.linear(v.mean((2, 3)), w1, t["b1"])), w2, t["b2"]).sigmoid()
    expected = v * s[:, :, None, None]
    expected.backward(t["y"])
    assert error(y, expected) < 1e-6
    for found, wanted in zip(leaves.values(), (x, bn.weight, w1, w2), strict=True):
        assert error(found.grad, wanted.grad) < 1e-5


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("activation", BRANCH_ACTIVATIONS)
def test_far_from_zero(implementation: str, activation: str) -> None:
    """Where an exponential leaves its range, each element for itself."""
    u = torch.tensor([-1e30, -200.0, -88.5, -20, -6, -3, -1e-6, 0, 1e-6, 3, 6, 20, 88.5, 200, 1e30])
    x = u.reshape(1, 1, 1, -1).expand(1, 2, 1, -1).clone().requires_grad_()
    with ops.use(implementation):
        y = ops.bn_act_se(
            *(x, None, None, torch.zeros(2), torch.ones(2)),
            **{"training": False, "momentum": 0.0, "eps": 0.0, "activation": activation},
        )
        y.backward(torch.ones_like(y))
    expected = x.detach().double().requires_grad_()
    MODULES[activation]()(expected).sum().backward()
    with torch.no_grad():
        wanted = MODULES[activation]()(expected)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=3e-6)
    inner = (expected != 0) & (expected.abs() != 3) & (expected != 6)  # slopes there are a choice
    slopes = torch.where(inner, expected.grad, x.grad.double())
    torch.testing.assert_close(x.grad.double(), slopes, rtol=1e-6, atol=3e-6)


def test_slopes_are_the_derivatives() -> None:
    u = torch.linspace(-8, 8, 999, dtype=torch.float64).requires_grad_()
    for activation, module in MODULES.items():
        (expected,) = torch.autograd.grad(module()(u).sum(), u)
        found = through(torch.ones_like(u), u.detach(), activation, 0.01)
        assert error(found, expected) < 1e-7, activation  # F.hardswish has 1/6 in float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str) -> None:
    sizes = {"channels": (3,), "N": 2, "spatial": (2, 2), "hidden": 2, "dtype": torch.float64}
    for activation, hidden, kinds in (
        ("silu", "silu", "b"),
        ("gelu", "hardswish", "r"),
        ("hardswish", "relu", "b"),
        ("relu6", "silu", "b"),
        ("leaky_relu", "silu", "b"),
    ):
        c = case(activation=activation, hidden_activation=hidden, kinds=kinds, **sizes)
        t = numbers(c)

        def act(*values: Tensor, c: Join = c, t: dict[str, Tensor] = t) -> Tensor:
            kept = {name: value.clone() for name, value in t.items()}
            given = dict(zip(DIFFERENTIATED, values, strict=True))
            return apply({**kept, **given}, c)

        with ops.use(implementation):
            leaves = [t[name].contiguous().requires_grad_() for name in DIFFERENTIATED]
            assert torch.autograd.gradcheck(act, leaves, check_undefined_grad=False)


def test_gradgradcheck() -> None:
    sizes = {"channels": (2,), "N": 2, "spatial": (2, 1), "hidden": 2, "dtype": torch.float64}
    c = case(hidden_activation="silu", **sizes)
    t = numbers(c)
    leaves = [t[name].contiguous().requires_grad_() for name in ("x0", "w1")]
    with ops.use(KERNELS):
        assert torch.autograd.gradgradcheck(
            lambda x, w: apply({**{k: v.clone() for k, v in t.items()}, "x0": x, "w1": w}, c),
            leaves,
        )


@NON_LEAF
def test_opcheck() -> None:
    t = {k: v.requires_grad_() for k, v in numbers(case()).items()}
    lists = [[t["x0"]], [t["weight0"]], [t["bias0"]], [t["mean0"].detach()], [t["var0"].detach()]]
    functions = ("tanh", "leaky_relu", 0.1, "silu")
    gate = [t[name] for name in ("w1", "b1", "w2", "b2")]
    opcheck(torch.ops.senet.join.default, (*lists, *gate, [2], [1e-5], *functions))
    with torch.no_grad():
        y, *kept = torch.ops.senet.join(*lists, *gate, [2], [1e-5], *functions)
    maps, weights = [t["x0"].detach()], [t[name].detach() for name in ("w1", "w2")]
    arguments = (torch.randn_like(y), maps, *weights, *kept, [2], *functions, [True] * 7)
    opcheck(torch.ops.senet.join_backward.default, arguments)


@pytest.mark.parametrize("implementation", FAST)
def test_branches_of_other_kinds_beside_it(implementation: str) -> None:
    """What no public function asks for yet: a map that goes in as it is beside activated ones."""
    t = numbers(Join(kinds="bn", channels=(21, 16)))
    found = {}
    for name in ("reference", implementation):
        maps = [t[f"x{i}"].detach().clone().requires_grad_() for i in range(2)]
        gate = [t[k].detach().clone().requires_grad_() for k in ("w1", "b1", "w2", "b2")]
        norm = ([t["weight0"], None], [t["bias0"], None], [None, None], [None, None])
        kinds = [2, NONE]
        arguments = Arguments(maps, *norm, *gate, kinds, [1e-5, 0.0], "tanh", "silu", 0.0, "silu")
        y = JOIN.run(name, arguments, (None, None))
        y.backward(t["y"])
        found[name] = [y, *(leaf.grad for leaf in (*maps, *gate))]
    for a, b in zip(found[implementation], found["reference"], strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden_activation", HIDDEN_ACTIVATIONS)
def test_squeeze_excite_with_another_hidden_activation(
    implementation: str, hidden_activation: str
) -> None:
    t = numbers(case())
    t = {k: v.requires_grad_() for k, v in t.items()}
    parameters = (t["w1"], t["b1"], t["w2"], t["b2"])
    activate = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish}[hidden_activation]
    with ops.use(implementation):
        y = ops.squeeze_excite(t["x0"], *parameters, hidden_activation=hidden_activation)
        found = torch.autograd.grad(y, (t["x0"], *parameters), t["y"])
    z = t["x0"].mean((2, 3))
    s = F.linear(activate(F.linear(z, t["w1"], t["b1"])), t["w2"], t["b2"]).sigmoid()
    expected = t["x0"] * s[:, :, None, None]
    wanted = torch.autograd.grad(expected, (t["x0"], *parameters), t["y"])
    assert error(y, expected) < 1e-6
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compile_in_one_graph(implementation: str) -> None:
    torch._dynamo.reset()
    c = case(hidden_activation="silu")
    results = []
    with ops.use(implementation):
        for f in (apply, torch.compile(apply, fullgraph=True, backend="aot_eager")):
            t = numbers(c)
            leaves = {k: t[k].requires_grad_() for k in ("x0", "weight0", "w1")}
            y = f({**t, **leaves}, c)
            y.backward(t["y"])
            results.append([y.detach(), t["mean0"], *(leaf.grad for leaf in leaves.values())])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) <= 1e-6


def test_keeps_only_its_input_for_backward() -> None:
    kept: list[Tensor] = []
    t = {k: v.requires_grad_() for k, v in numbers(case()).items()}
    running = {k: v.detach() for k, v in t.items() if k[:3] in ("mea", "var")}
    with ops.use(KERNELS), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda s: s):
        apply({**t, **running}, case())
    large = {s.data_ptr() for s in kept if s is not None and s.ndim == 4}
    assert large == {t["x0"].data_ptr()}


@CPP
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    c = case(channels=(72,), N=5, spatial=(30, 31), hidden=33, hidden_activation="silu")
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run("cpu", c))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_images(implementation: str) -> None:
    found = run(implementation, case(N=0))
    assert found["y"].shape == (0, 21, 5, 7)
    assert not any(found[name].any() for name in ("w1", "b2", "weight", "bias"))


def test_slope_of_the_leaky_relu() -> None:
    t = numbers(case())
    norm = {"training": True, "momentum": 0.1, "eps": 1e-5}
    x = (t["x0"], None, None, None, None)
    found = ops.bn_act_se(*x, activation=ops.Activation("leaky_relu", 0.3), **norm)
    by_name = ops.bn_act_se(*x, activation="leaky_relu", **norm)
    plain = ops.bn_act_se(*x, activation="none", **norm)
    assert error(found, F.leaky_relu(plain, 0.3)) < 1e-6
    assert error(by_name, F.leaky_relu(plain)) < 1e-6


def test_bad_arguments() -> None:
    t = numbers(case())
    norm = (t["weight0"], t["bias0"], t["mean0"], t["var0"])
    options = {"training": True, "momentum": 0.1, "eps": 1e-5}
    with pytest.raises(UserError, match="activation is 'swish'; choose one of linear, relu"):
        ops.bn_act_se(t["x0"], *norm, activation="swish", **options)
    with pytest.raises(UserError, match="hidden_activation is 'gelu'; choose one of relu, silu"):
        ops.bn_act_se(t["x0"], *norm, activation="silu", hidden_activation="gelu", **options)
    with pytest.raises(UserError, match="gate is 'softmax'"):
        ops.bn_act_se(t["x0"], *norm, activation="silu", gate="softmax", **options)
    with pytest.raises(UserError, match=r"weight has shape \(21,\); the input needs \(7,\)"):
        ops.bn_act_se(t["x0"][:, :7], *norm, activation="silu", **options)
    with pytest.raises(UserError, match="give both weights, or None for all four"):
        ops.bn_act_se(t["x0"], *norm, t["w1"], activation="silu", **options)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.bn_act_se(t["x0"][:1, :, :1, :1], *norm, activation="silu", **options)
    with pytest.raises(UserError, match="hidden_activation is 'tanh'"):
        ops.squeeze_excite(t["x0"], t["w1"], None, t["w2"], None, hidden_activation="tanh")
