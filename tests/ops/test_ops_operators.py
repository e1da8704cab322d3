"""How the operators behave inside PyTorch: opcheck, gradcheck, compilers, autocast, DDP, flops."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import IMPLEMENTATIONS, PARAMETERS, SHORTCUTS, Case, apply, inputs, parts
from tolerances import error
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from senet import ops
from senet.ops.cpu import tail as cpu_tail
from senet.ops.tail import Gradients

C, H = 6, 3


def tail_arguments(
    normalization: str, shortcut: str, gated: bool, gate: str, relu: bool
) -> tuple[Any, ...]:
    """Arguments of `senet::tail` that all require gradients where they can."""
    t = inputs(Case(N=2, C=C, hidden=H, spatial=(3, 4)))
    t["w2"] = t["w2"][:, :, None, None].contiguous()  # as of a 1x1 convolution
    for name in ("x", "shortcut", *PARAMETERS):
        t[name].requires_grad_()
    norm = [t["weight"], t["bias"], t["running_mean"], t["running_var"]]
    normalized = shortcut == "normalized"
    other = [t["shortcut_weight"], t["shortcut_bias"], t["shortcut_mean"], t["shortcut_var"]]
    return (
        t["x"],
        None if shortcut == "none" else t["shortcut"],
        *(norm if normalization != "none" else [None] * 4),
        *(other if normalized else [None] * 4),
        *([t["w1"], t["b1"], t["w2"], t["b2"]] if gated else [None] * 4),
        *(normalization, normalized, 1e-5, 1e-3, gate, relu),
    )


CONFIGURATIONS = [
    ("batch", "plain", True, "sigmoid", True),
    ("batch", "normalized", True, "tanh", True),
    ("running", "none", False, "sigmoid", True),
    ("running", "normalized", True, "hard_sigmoid", False),
    ("none", "none", True, "identity_sigmoid", False),
]


SCHEMAS = {
    "tail": "senet::tail(Tensor x, Tensor? shortcut, Tensor? weight, Tensor? bias,"
    " Tensor? running_mean, Tensor? running_var, Tensor? shortcut_weight, Tensor? shortcut_bias,"
    " Tensor? shortcut_mean, Tensor? shortcut_var, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2,"
    " str normalization, bool normalize_shortcut, float eps, float shortcut_eps, str gate,"
    ' bool relu, str activation="linear", float negative_slope=0.)'
    " -> (Tensor y, Tensor statistics, Tensor squeezed, Tensor hidden, Tensor gates)",
    "join": "senet::join(Tensor[] maps, Tensor?[] weights, Tensor?[] biases, Tensor?[] means,"
    " Tensor?[] variances, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, int[] normalizations,"
    ' float[] eps, str gate, str activation="relu", float negative_slope=0.,'
    ' str hidden_activation="relu")'
    " -> (Tensor y, Tensor statistics, Tensor squeezed, Tensor hidden, Tensor gates)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_of_exported_graphs(name: str) -> None:
    """Programs that were exported before hold it; what was added since has defaults."""
    assert str(getattr(torch.ops.senet, name).default._schema) == SCHEMAS[name]


# opcheck itself reads .grad of tensors that are no leaves
NON_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@NON_LEAF
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_opcheck(configuration: tuple[Any, ...]) -> None:
    arguments = tail_arguments(*configuration)
    opcheck(torch.ops.senet.tail.default, arguments)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    normalization, shortcut, gated, gate, relu = configuration
    y, *kept = torch.ops.senet.tail(*detached)
    x, r, w, b, _, _, rw, rb, _, _, w1, _, w2, _ = detached[:14]
    normalized = shortcut == "normalized"
    wanted = [True, normalized or shortcut == "plain", w is not None, w is not None]
    wanted += [normalized] * 2 + [gated] * 4
    backward = (
        torch.randn_like(y),
        x,
        y if relu and shortcut == "plain" else None,
        r if normalized else None,
        *(w, b, rw, rb, w1, w2, *kept, normalization, normalized, gate, relu, "linear", 0.0),
        wanted,
    )
    opcheck(torch.ops.senet.tail_backward.default, backward)


@NON_LEAF
@pytest.mark.parametrize("activation", ["silu", "leaky_relu"])
def test_opcheck_of_another_activation(activation: str) -> None:
    arguments = (*tail_arguments("batch", "plain", True, "sigmoid", False), activation, 0.2)
    opcheck(torch.ops.senet.tail.default, arguments)
    given = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    y, *kept = torch.ops.senet.tail(*given)
    x, r, w, b, w1, w2 = (given[i] for i in (0, 1, 2, 3, 10, 12))
    options = ("batch", False, "sigmoid", False, activation, 0.2)
    wanted = [True] * 4 + [False] * 2 + [True] * 4
    backward = (torch.randn_like(y), x, None, r, w, b, None, None, w1, w2, *kept, *options, wanted)
    opcheck(torch.ops.senet.tail_backward.default, backward)


@NON_LEAF
def test_opcheck_of_unusual_strides() -> None:
    arguments = list(tail_arguments("none", "none", True, "relu", False))
    arguments[0] = torch.randn(2, C, 3, 8)[..., ::2].requires_grad_()
    opcheck(torch.ops.senet.tail.default, tuple(arguments))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str) -> None:
    names = ("x", "shortcut", *PARAMETERS)
    small = {"N": 2, "C": 3, "spatial": (2, 2), "hidden": 2, "dtype": torch.float64}
    gates = [g for g in ops.GATES for _ in range(5)]
    cases = [replace(c, gate=g) for g, c in zip(gates, parts(**small), strict=False)]
    for activation in ops.BRANCH_ACTIVATIONS[2:]:
        for shortcut in SHORTCUTS:
            cases.append(Case(**small, shortcut=shortcut, activation=activation))
    for case in cases:
        t = inputs(case)
        frozen = {k: v for k, v in t.items() if k not in names}

        def tail(*values: Tensor, case: Case = case, frozen: dict[str, Tensor] = frozen) -> Tensor:
            kept = {k: v.clone() for k, v in frozen.items()}
            return apply({**kept, **dict(zip(names, values, strict=True))}, case)

        with ops.use(implementation):
            leaves = [t[name].contiguous().requires_grad_() for name in names]
            assert torch.autograd.gradcheck(tail, leaves, check_undefined_grad=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck_of_squeeze_excite(implementation: str) -> None:
    t = inputs(Case(N=2, C=3, spatial=(2, 2), hidden=2, dtype=torch.float64))
    leaves = [t[name].contiguous().requires_grad_() for name in ("x", "w1", "b1", "w2", "b2")]
    for gate in ops.GATES:
        with ops.use(implementation):
            assert torch.autograd.gradcheck(
                lambda *v, gate=gate: ops.squeeze_excite(*v, gate), leaves
            )


def compiled_equals_eager(
    f: Callable[..., Tensor],
    t: dict[str, Tensor],
    tolerance: float,
    trained: tuple[str, ...] = ("x", "shortcut", "weight"),
    **options: Any,
) -> None:
    results = []
    for g in (f, torch.compile(f, fullgraph=True, **options)):
        case_inputs = {k: v.clone() for k, v in t.items()}
        leaves = {k: case_inputs[k].requires_grad_() for k in trained}
        y = g({**case_inputs, **leaves})
        y.backward(t["gradient"])
        found = [y.detach(), case_inputs["running_mean"], case_inputs["running_var"]]
        results.append(found + [leaf.grad for leaf in leaves.values()])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) <= tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compile_in_one_graph(implementation: str) -> None:
    torch._dynamo.reset()
    for case in (Case(), Case(shortcut="normalized", training=False), Case(gated=False)):
        trained = ("x", "shortcut", "weight", *(("w1", "b2") if case.gated else ()))
        with ops.use(implementation):
            compiled_equals_eager(
                lambda t, case=case: apply(t, case),
                inputs(case),
                1e-6,
                trained,
                backend="aot_eager",
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compile_without_gradients(implementation: str) -> None:
    torch._dynamo.reset()
    case = Case(training=False)
    t = inputs(case)
    with ops.use(implementation):
        compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")(t, case)
        assert error(compiled, apply(t, case)) <= 1e-6


def test_inductor_fuses_the_algebra() -> None:
    torch._dynamo.reset()
    case = Case(shortcut="normalized")
    with ops.use("algebra"):
        compiled_equals_eager(lambda t: apply(t, case), inputs(case), 1e-5, ("x", "w1", "b2"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)
        self.fc1 = nn.Conv2d(C, H, 1)
        self.fc2 = nn.Conv2d(H, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return ops.bn_se_add_relu(
            x,
            x,
            *(bn.weight, bn.bias, bn.running_mean, bn.running_var),
            *(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias),
            training=self.training,
            momentum=0.1,
            eps=bn.eps,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_export_with_dynamic_batch(implementation: str) -> None:
    block = Block().eval()
    x = torch.randn(3, C, 5, 4)
    with ops.use(implementation):
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
        program = torch.export.export(block, (x,), dynamic_shapes=shapes)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert ("senet.tail.default" in called) == (implementation == "cpu")
        for n in (3, 5):
            x = torch.randn(n, C, 5, 4)
            assert error(program.module()(x), block(x)) < 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_jit_trace_records_the_operator() -> None:
    block = Block().eval()
    with torch.no_grad(), ops.use("cpu"):
        traced = torch.jit.trace(block, torch.randn(2, C, 4, 4))
        x = torch.randn(3, C, 4, 4)
        assert torch.equal(traced(x), block(x))


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        *((name, torch.bfloat16) for name in IMPLEMENTATIONS),
        *((name, torch.float16) for name in ("reference", "algebra", "auto")),
    ],
)
def test_autocast_keeps_the_gate_in_float32(implementation: str, dtype: torch.dtype) -> None:
    block = Block()
    with torch.no_grad():  # a squeeze of 300: products of it leave float16's range
        block.bn.bias.fill_(300)
        block.fc1.weight.fill_(60)
        block.fc1.bias.zero_()
        block.fc2.weight.copy_(
            torch.linspace(-2e-5, 2e-5, C).reshape(C, 1, 1, 1).expand(-1, H, 1, 1)
        )
    x = (torch.randn(4, C, 9, 9)).to(dtype)
    with ops.use(implementation), torch.autocast("cpu", dtype=dtype):
        y = block(x)
        y.float().mean().backward()
    with ops.use("reference"):
        expected = Block.forward(block, x.float())
    assert y.dtype == dtype
    assert error(y, expected) < 2**-8 + 1e-5
    assert block.fc1.weight.grad is not None
    assert block.fc1.weight.grad.isfinite().all()


def test_operator_under_autocast_and_modes() -> None:
    """What takes the dispatcher's way gives what the direct way gives."""
    block = Block()
    x = torch.randn(4, C, 9, 9).bfloat16()
    with ops.use("cpu"), torch.autocast("cpu", dtype=torch.bfloat16):
        direct = block(x)
        with FlopCounterMode(display=False):
            dispatched = block(x)
    assert torch.equal(direct, dispatched)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(implementation: str, mode: Callable[[], Any]) -> None:
    block = Block().eval()
    x = torch.randn(2, C, 4, 4)
    with ops.use(implementation):
        expected = block(x)
        with mode():
            y = block(x)
            assert not y.requires_grad
        assert torch.equal(y, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flops_of_the_fully_connected_layers(implementation: str) -> None:
    """Two products of N·C·h multiply-adds forward, each with two gradients backward."""
    block, N = Block(), 5
    x = torch.randn(N, C, 4, 4, requires_grad=True)
    product = 2 * N * C * H
    with ops.use(implementation):
        with FlopCounterMode(display=False) as forward:
            y = block(x)
        with FlopCounterMode(display=False) as both:
            block(x).sum().backward()
        for parameter in block.parameters():
            parameter.requires_grad_(False)
        with FlopCounterMode(display=False) as frozen:
            block(x).sum().backward()
    assert y.shape == x.shape
    assert forward.get_total_flops() == 2 * product
    assert both.get_total_flops() == 6 * product
    assert frozen.get_total_flops() == 4 * product


def test_kept_for_backward() -> None:
    """Of feature-map size only x and y (plain shortcut), x and shortcut (projection), or x."""
    for shortcut, maps in (("plain", 2), ("normalized", 2), ("none", 1)):
        for implementation in ("algebra", "cpu"):
            case = Case(N=2, C=8, spatial=(16, 16), hidden=2, shortcut=shortcut)
            t = {k: v.requires_grad_("running" not in k) for k, v in inputs(case).items()}
            kept: list[Tensor] = []

            def pack(saved: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(saved)
                return saved

            with (
                ops.use(implementation),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda s: s),
            ):
                y = apply({k: v if v.is_leaf else v.detach() for k, v in t.items()}, case)
            large = [s for s in kept if s.numel() >= t["x"].numel()]
            addresses = {t["x"].data_ptr(), t["shortcut"].data_ptr(), y.data_ptr()}
            assert len(large) == maps, (shortcut, implementation)
            assert {s.data_ptr() for s in large} <= addresses


def test_no_wasted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are asked for the gradients that are needed, and for no other."""
    asked: list[Gradients[bool]] = []
    real = cpu_tail.backward

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(cpu_tail, "backward", spy)
    block = Block()
    x = torch.randn(2, C, 4, 4)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    block.fc2.bias.requires_grad_()
    with ops.use("cpu"):
        block(x).sum().backward()
    assert asked == [Gradients(*[False] * 9, b2=True)]


def test_changing_what_backward_needs_is_noticed() -> None:
    case = Case()
    t = inputs(case)
    for victim, name in (("x", "plain"), ("y", "plain"), ("shortcut", "normalized")):
        leaf = t["weight"].clone().requires_grad_()
        kept = {**{k: v.clone() for k, v in t.items()}, "weight": leaf}
        with ops.use("cpu"):
            y = apply(kept, Case(shortcut=name))
            (y if victim == "y" else kept[victim]).mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_in_place_relu_after_a_tail_without_shortcut() -> None:
    """Nothing of y is kept there, so an in-place operation on it is allowed and exact."""
    case = Case(shortcut="none", dtype=torch.float64)
    grads = []
    for implementation in ("reference", "cpu"):
        t = inputs(case)
        t["x"].requires_grad_()
        with ops.use(implementation):
            y = apply(t, case)
            (y.mul_(3) if implementation == "cpu" else y * 3).sum().backward()
        grads.append(t["x"].grad)
    assert error(grads[1], grads[0]) < 1e-12


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for wrapped in (False, True):
        block = Block()
        torch.manual_seed(1)
        for p in block.parameters():
            nn.init.normal_(p)
        x = torch.randn(2, C, 4, 4, requires_grad=True)
        y = checkpoint(block, x, use_reentrant=False) if wrapped else block(x)
        y.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_double_backward_of_the_reference() -> None:
    x = torch.randn(2, C, 4, 4, dtype=torch.float64, requires_grad=True)
    block = Block().double().eval()
    with ops.use("reference"):
        assert torch.autograd.gradgradcheck(lambda v: block(v), x)


def test_func_transforms() -> None:
    x = torch.randn(2, C, 4, 4)
    block = Block().eval()
    gradient = torch.func.grad(lambda v: block(v).square().sum())(x)
    leaf = x.clone().requires_grad_()
    block(leaf).square().sum().backward()
    assert error(gradient, leaf.grad) < 1e-5


DDP_SCRIPT = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_ops_operators import Block, C
from senet import ops
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
block = torch.nn.parallel.DistributedDataParallel(Block())
x = torch.randn(4, C, 5, 5)
with ops.use("cpu"):
    block(x[2 * rank : 2 * rank + 2]).square().sum().backward()
torch.save({n: p.grad for n, p in block.module.named_parameters()}, sys.argv[2] + sys.argv[3])
dist.destroy_process_group()
"""


def test_distributed_data_parallel_averages_gradients(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    store = str(tmp_path / "store")
    processes = [
        subprocess.Popen([sys.executable, "-c", DDP_SCRIPT, here, store, str(rank)])
        for rank in range(2)
    ]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    found = [torch.load(store + str(rank)) for rank in range(2)]
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(4, C, 5, 5)
    with ops.use("reference"):
        (block(x[:2]).square().sum() / 2).backward()
        (block(x[2:]).square().sum() / 2).backward()
    for name, parameter in block.named_parameters():
        assert torch.equal(found[0][name], found[1][name])
        assert error(found[0][name], parameter.grad) < 1e-5
