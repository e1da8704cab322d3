"""Every implementation against the float64 oracle: outputs, statistics and every gradient."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_cases import FAST, LAYOUTS, PARAMETERS, TRITON, Case, apply, inputs, oracle, parts, run
from tolerances import assert_close, error

from senet import ops
from senet.errors import UserError
from senet.ops import BRANCH_ACTIVATIONS, GATES

OTHERS = tuple(name for name in BRANCH_ACTIVATIONS if name not in ("linear", "relu"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, *((torch.float16,) if TRITON else ()))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_parts_of_the_tail(implementation: str, layout: str, dtype: torch.dtype) -> None:
    for case in parts(layout=layout, dtype=dtype):
        assert_close(run(implementation, case), oracle(case), dtype, case)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("activation", OTHERS)
def test_other_activations_behind_the_addition(
    implementation: str, layout: str, activation: str
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for case in parts(layout=layout, dtype=dtype, activation=activation):
            if case.relu:  # says whether there is an activation at all
                assert_close(run(implementation, case), oracle(case), dtype, case)


@pytest.mark.parametrize("activation", OTHERS)
@pytest.mark.parametrize("shortcut", ["none", "plain", "normalized"])
def test_other_activations_are_pytorchs(activation: str, shortcut: str) -> None:
    case = Case(activation=activation, shortcut=shortcut, dtype=torch.float64)
    t = inputs(case)
    with ops.use("reference"):
        y = apply(t, case)
        bare = apply(t, replace(case, relu=False, activation="relu"))
    functions = {"hardswish": F.hardswish, "leaky_relu": F.leaky_relu, "gelu": F.gelu}
    functions |= {"silu": F.silu, "relu6": F.relu6}
    # F.hardswish has 1/6 in float32
    torch.testing.assert_close(y, functions[activation](bare), rtol=1e-6, atol=1e-6)


def test_slope_of_the_leaky_relu_behind_the_addition() -> None:
    t = inputs(Case())
    norm = (t["weight"], t["bias"], None, None)
    options = {"training": True, "momentum": 0.1, "eps": 1e-5}
    bare = ops.bn_se_add_relu(t["x"], t["shortcut"], *norm, relu=False, **options)
    activation = ops.Activation("leaky_relu", 0.3)
    y = ops.bn_se_add_relu(t["x"], t["shortcut"], *norm, activation=activation, **options)
    torch.testing.assert_close(y, F.leaky_relu(bare, 0.3), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="activation is 'swish'; choose one of linear, relu"):
        ops.bn_se_add_relu(t["x"], None, *norm, activation="swish", **options)
    with pytest.raises(UserError, match="'silu' is given with relu=False"):
        ops.bn_se_add_relu(t["x"], None, *norm, activation="silu", relu=False, **options)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("N", "C", "spatial", "hidden"),
    [
        (6, 64, (1, 1), 4),  # a linear layer's output
        (1, 128, (27, 40), 3),  # one image, several tasks
        (2, 1, (4, 4), 1),  # channels_last and contiguous at once
        (3, 17, (9,), 2),
        (2, 16, (3, 4, 5), 8),
        (9, 70, (6, 6), 33),  # more than one tile of the gate's products in each direction
        (2, 640, (8, 8), 40),
    ],
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_shapes(
    implementation: str, N: int, C: int, spatial: tuple[int, ...], hidden: int, layout: str
) -> None:
    sizes = {"N": N, "C": C, "spatial": spatial, "hidden": hidden, "layout": layout}
    for case in parts(**sizes):
        if case.training and N * torch.Size(spatial).numel() == 1:
            continue
        assert_close(run(implementation, case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("gate", GATES)
def test_gates(implementation: str, gate: str) -> None:
    for training in (True, False):
        for biases in (True, False):
            case = Case(gate=gate, training=training, biases=biases, C=40, hidden=19)
            assert_close(run(implementation, case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("training", [True, False])
def test_without_affine_parameters(implementation: str, training: bool) -> None:
    for shortcut in ("plain", "normalized"):
        case = Case(affine=False, training=training, shortcut=shortcut)
        assert_close(run(implementation, case), oracle(case), case.dtype, case)


def squeeze_excite_results(
    implementation: str, case: Case, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    t = {
        k: v.detach().to(dtype if k in ("x", "gradient") else v.dtype)
        for k, v in inputs(case).items()
    }
    if dtype == torch.float64:
        t = {k: v.double() for k, v in t.items()}
    names = ("x", "w1", "b1", "w2", "b2") if case.biases else ("x", "w1", "w2")
    leaves = {k: t[k].clone().requires_grad_() for k in names}
    with ops.use(implementation):
        y = ops.squeeze_excite(
            leaves["x"], leaves["w1"], leaves.get("b1"), leaves["w2"], leaves.get("b2"), case.gate
        )
        y.backward(t["gradient"])
    return {"y": y.detach()} | {k: v.grad for k, v in leaves.items() if v.grad is not None}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_excite(implementation: str, dtype: torch.dtype, layout: str) -> None:
    for gate in GATES:
        for N, C, spatial, hidden in (
            (3, 21, (5, 7), 5),
            (5, 64, (40, 41), 4),  # several groups of images
            (2, 33, (7,), 3),
            (2, 8, (3, 4, 5), 2),
        ):
            sizes = {"N": N, "C": C, "spatial": spatial, "hidden": hidden}
            case = Case(dtype=dtype, layout=layout, gate=gate, biases=gate != "tanh", **sizes)
            expected = squeeze_excite_results("reference", case, torch.float64)
            assert_close(squeeze_excite_results(implementation, case, dtype), expected, dtype, case)


@pytest.mark.parametrize("implementation", FAST)
def test_groups_of_images_add_up(implementation: str) -> None:
    """With running statistics the C++ kernels work image by image; the gradients are of all."""
    case = Case(N=7, C=128, spatial=(48, 48), hidden=8, training=False, shortcut="normalized")
    assert_close(run(implementation, case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_result_has_layout_and_type_of_x(implementation: str) -> None:
    for dtype in DTYPES:
        for layout in ("channels_last", "contiguous"):
            case = Case(dtype=dtype, layout=layout)
            results = run(implementation, case)
            assert results["y"].dtype == dtype
            assert results["x"].dtype == dtype
            assert results["y"].stride() == inputs(case)["x"].stride()


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shortcut", ["none", "plain", "normalized"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_subsets_of_gradients(
    implementation: str, shortcut: str, activation: str, training: bool
) -> None:
    """Any subset of the inputs may require gradients; the rest gets none, the values stay."""
    everything = ("x", "shortcut", *PARAMETERS)
    for relu in (True, False) if activation == "relu" else (True,):
        case = Case(shortcut=shortcut, training=training, relu=relu, activation=activation)
        full = oracle(case)
        singles = [(name,) for name in everything]
        others = [tuple(n for n in everything if n != name) for name in everything]
        for subset in ((), *singles, *others):
            expected = {k: v for k, v in full.items() if k in subset or k not in everything}
            found = run(implementation, case, gradients=subset)
            assert_close(found, expected, case.dtype, (case, subset))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    N=st.integers(1, 5),
    C=st.integers(1, 40),
    spatial=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    hidden=st.integers(1, 20),
    shortcut=st.sampled_from(("none", "plain", "normalized")),
    gated=st.booleans(),
    relu=st.booleans(),
    training=st.booleans(),
    gate=st.sampled_from(GATES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(**drawn: object) -> None:
    case = Case(dtype=torch.float64, **drawn)
    count = case.N * torch.Size(case.spatial).numel()
    if case.training and count < 3:  # xhat is ±1 whatever x is: dx is rounding noise only
        return
    expected = oracle(case)
    for implementation in FAST:
        found = run(implementation, case)
        for name, value in expected.items():
            # few values per channel: inv_std is large and dx cancels, in the oracle too
            assert error(found[name], value) < 1e-9 or value.abs().max() < 1e-9, (case, name)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_shortcut_that_is_x_or_is_used_twice(implementation: str) -> None:
    case = Case(dtype=torch.float64)
    t = inputs(case)
    grads = {}
    for name in ("reference", implementation):
        x = t["x"].clone().requires_grad_()
        with ops.use(name):
            rest = (t["weight"], t["bias"], None, None, t["w1"], t["b1"], t["w2"], t["b2"])
            y = ops.bn_se_add_relu(x, x, *rest, training=True, momentum=0.1, eps=1e-5)
            z = ops.bn_se_add_relu(y, x, *rest, training=True, momentum=0.1, eps=1e-5)
            (z + y).backward(t["gradient"])
        grads[name] = x.grad
    assert error(grads[implementation], grads["reference"]) < 1e-12
