"""SE behind joined branches: numbers, gradients, and how the operator behaves inside PyTorch."""

from typing import Any

import pytest
import torch
from join_cases import Join, apply, joins, numbers, oracle, run
from ops_cases import CPP, DEVICE, FAST, IMPLEMENTATIONS, KERNELS, LAYOUTS
from test_ops_operators import NON_LEAF
from tolerances import assert_close, error
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from senet import ops
from senet.errors import UserError
from senet.ops import BRANCH_ACTIVATIONS, GATES


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_branch(implementation: str, layout: str, dtype: torch.dtype) -> None:
    for case in joins(layout=layout, dtype=dtype):
        assert_close(run(implementation, case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("activation", BRANCH_ACTIVATIONS)
def test_activations_of_the_branches(implementation: str, activation: str) -> None:
    for gated in (True, False):
        case = Join(joined=activation, gated=gated)
        assert_close(run(implementation, case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "sizes",
    [
        {"spatial": (1, 1), "N": 6},
        {"spatial": (27, 40), "N": 1, "channels": (96, 200), "kinds": "bb"},  # several tasks
        {"spatial": (9,)},
        {"spatial": (3, 4, 5)},
        {"channels": (1, 1, 1, 1)},  # channels_last and contiguous at once
        {"channels": (640, 3), "kinds": "bn", "spatial": (8, 8), "hidden": 40},
        {"channels": (7,), "kinds": "b"},
        {"spatial": (64, 64), "channels": (64, 64), "kinds": "rr", "N": 5},  # groups of images
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_shapes(implementation: str, sizes: dict[str, Any], layout: str) -> None:
    for gated in (True, False):
        case = Join(**sizes, layout=layout, gated=gated)
        assert_close(run(implementation, case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("implementation", FAST)
def test_gates_and_absent_parameters(implementation: str) -> None:
    for gate in GATES:
        for affine in (True, False):
            case = Join(gate=gate, affine=affine, biases=not affine)
            assert_close(run(implementation, case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str) -> None:
    for kinds, gate, gated in (
        ("bn", "tanh", True),
        ("rb", "sigmoid", True),
        ("bn", "relu", False),
    ):
        sizes = {"channels": (3, 2), "N": 2, "spatial": (2, 2), "hidden": 2}
        case = Join(kinds=kinds, gate=gate, gated=gated, dtype=torch.float64, **sizes)
        t = numbers(case)
        names = [name for name in t if name[:3] not in ("mea", "var") and name != "y"]

        def join(*values: Tensor, case: Join = case, t: dict[str, Tensor] = t) -> Tensor:
            kept = {name: value.clone() for name, value in t.items()}
            given = [name for name in t if name[:3] not in ("mea", "var") and name != "y"]
            return apply({**kept, **dict(zip(given, values, strict=True))}, case)

        with ops.use(implementation):
            leaves = [t[name].contiguous().requires_grad_() for name in names]
            assert torch.autograd.gradcheck(join, leaves, check_undefined_grad=False)


@NON_LEAF
def test_opcheck() -> None:
    for gated in (True, False):
        t = {k: v.requires_grad_() for k, v in numbers(Join(gated=gated)).items()}
        w1 = t["w1"][:, :, None, None].detach().requires_grad_()  # as of a 1x1 convolution
        lists = [[t[f"{name}{i}"] for i in range(4)] for name in ("x", "weight", "bias")]
        lists += [[t[f"{name}{i}"].detach() for i in range(4)] for name in ("mean", "var")]
        gate = [w1, t["b1"], t["w2"], None] if gated else [None] * 4
        options = ([2, 0, 1, 2], [1e-5] * 4, "sigmoid")  # the rest are defaults
        opcheck(torch.ops.senet.join.default, (*lists, *gate, *options))
        with torch.no_grad():
            y, *kept = torch.ops.senet.join(*lists, *gate, *options)
        maps = [x.detach() for x in lists[0]]
        weights = [None if w is None else w.detach() for w in (gate[0], gate[2])]
        wanted = [True, False, True, True] + [True, False] * 4 + [gated] * 4
        arguments = (
            torch.randn_like(y),
            maps,
            *weights,
            *kept,
            options[0],
            "sigmoid",
            "relu",
            0.0,
            "relu",
            wanted,
        )
        opcheck(torch.ops.senet.join_backward.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compile_in_one_graph(implementation: str) -> None:
    torch._dynamo.reset()
    case = Join()
    results = []
    with ops.use(implementation):
        for f in (apply, torch.compile(apply, fullgraph=True, backend="aot_eager")):
            t = numbers(case)
            leaves = {k: t[k].requires_grad_() for k in ("x0", "x2", "weight1", "w1")}
            y = f({**t, **leaves}, case)
            y.backward(t["y"])
            results.append([y.detach(), t["mean0"], *(leaf.grad for leaf in leaves.values())])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) <= 1e-6


def test_inductor_fuses_the_algebra() -> None:
    torch._dynamo.reset()
    t = numbers(Join())
    with ops.use("algebra"):
        eager = apply({k: v.clone() for k, v in t.items()}, Join())
        compiled = torch.compile(apply, fullgraph=True)(t, Join())
    assert error(compiled, eager) <= 1e-6


def test_the_operator_takes_what_the_kernels_do_not() -> None:
    case = Join(dtype=torch.float16)
    expected = oracle(case)
    found = run("auto", case)
    assert found["y"].dtype == torch.float16
    assert error(found["y"], expected["y"]) <= 2**-10


def test_maps_of_several_types_and_layouts() -> None:
    """As torch.cat: the common type; one channels_last map makes the result so."""
    t = numbers(Join(layout="contiguous"))
    t["x1"] = t["x1"].bfloat16()
    t["x2"] = t["x2"].contiguous(memory_format=torch.channels_last)
    found = {}
    for implementation in ("reference", *FAST):
        with ops.use(implementation):
            given = {k: v.clone() for k, v in t.items()}
            found[implementation] = apply(given, Join())
    for implementation in FAST:
        y = found[implementation]
        assert y.dtype == torch.float32
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, found["reference"]) <= 3e-6


@pytest.mark.parametrize("implementation", FAST)
def test_autocast_changes_nothing(implementation: str) -> None:
    case = Join(dtype=torch.bfloat16)
    plain = run(implementation, case)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        again = run(implementation, case)
    assert all(torch.equal(again[name], value) for name, value in plain.items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_images(implementation: str) -> None:
    found = run(implementation, Join(N=0))
    assert found["y"].shape == (0, 75, 5, 7)
    assert not any(found[name].any() for name in ("w1", "b2", "weight", "bias"))
    before = [t for name, t in numbers(Join(N=0)).items() if name[:4] == "mean"]
    assert torch.equal(found["mean"], torch.cat(before))


@CPP
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    for kinds in ("bbnr", "rrnr"):
        case = Join(kinds=kinds, channels=(72, 64, 16, 96), N=5, spatial=(30, 31), hidden=33)
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run("cpu", case))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(result[name], value) for name, value in results[0].items())


@CPP
def test_large_maps_are_streamed_correctly() -> None:
    """Above 24 MB the kernels write past the cache: the same bits as for a part of the map."""
    for channels in ((96, 160), (95, 161)):
        case = Join(kinds="rr", channels=channels, N=1, spatial=(160, 160), gated=False, hidden=2)
        t = numbers(case)
        whole = run("cpu", case, t)
        for start in range(0, 160, 40):
            rows = slice(start, start + 40)
            part = {k: v[:, :, rows] if v.ndim == 4 else v for k, v in t.items()}
            cut = run("cpu", case, part)
            for name in ("y", "x"):
                assert torch.equal(whole[name][:, :, rows], cut[name])


def test_keeps_only_its_inputs_for_backward() -> None:
    kept: list[Tensor] = []
    t = {k: v.requires_grad_() for k, v in numbers(Join()).items()}
    running = {k: v.detach() for k, v in t.items() if k[:3] in ("mea", "var")}
    with ops.use(KERNELS), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda s: s):
        apply({**t, **running}, Join())
    large = {s.data_ptr() for s in kept if s is not None and s.ndim == 4}
    assert large == {t[f"x{i}"].data_ptr() for i in range(4)}


def test_flops_of_the_fully_connected_layers() -> None:
    case = Join()
    product = 2 * case.N * sum(case.channels) * case.hidden
    for implementation in IMPLEMENTATIONS:
        with FlopCounterMode(display=False) as counted:
            run(implementation, case)
        assert counted.get_total_flops() == 6 * product


def test_bad_arguments() -> None:
    t = numbers(Join())
    x, norm = t["x0"], ops.BatchNorm(t["weight0"], t["bias0"], t["mean0"], t["var0"])
    with pytest.raises(UserError, match=r"maps, norms, training have 1, 2, 1 entries"):
        ops.bn_relu_concat_se([x], [norm, None], training=[True])
    with pytest.raises(UserError, match="activation is 'swish'; choose one of linear, relu"):
        ops.bn_relu_concat_se([x], [norm], training=[True], activation="swish")
    with pytest.raises(UserError, match="at least one"):
        ops.bn_relu_concat_se([], [], training=[])
    with pytest.raises(UserError, match=r"maps\[1\] has shape .* differ in their channels only"):
        ops.bn_relu_concat_se([x, x[:1]], [norm, None], training=[True, False])
    with pytest.raises(UserError, match=r"norms\[1\]\.weight has shape \(21,\).*needs \(16,\)"):
        ops.bn_relu_concat_se([x, t["x1"]], [norm, norm], training=[True, False])
    w1 = t["w1"][:, :37]
    with pytest.raises(UserError, match=r"w1 has shape .* an input of 37 channels"):
        ops.bn_relu_concat_se(
            [x, t["x1"]], [norm, None], t["w1"], None, w1.T, None, training=[0, 0]
        )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.bn_relu_concat_se([x[:1, :, :1, :1]], [norm], training=[True])
