"""Optimized networks in threads, with many shapes, and with weights that are edited."""

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet import create_model, kernels
from senet.errors import UserError
from senet.inference import OptimizedModel, optimize, plans, workspaces
from senet.inference.kernels import allocate
from senet.inference.program import Program
from senet.inference.rewrite import Rewriter
from senet.inference.steps import TorchStep
from senet.inference.workspaces import Workspace, Workspaces

pytestmark = pytest.mark.skipif(bool(kernels.MISSING), reason=kernels.MISSING)
SIDES = range(33, 45)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("se_resnet8_cifar", num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture
def fast() -> OptimizedModel:
    return optimize(network(), torch.randn(1, 3, 32, 32))


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads take turns a thousand times as often as they would."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(former)


def in_threads(work: Callable[[int], None], count: int = 4) -> list[BaseException]:
    """Run `work(0)`, `work(1)`, … at the same time, and return what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(count)

    def guarded(number: int) -> None:
        start.wait()
        try:
            with torch.no_grad():
                work(number)
        except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@torch.no_grad()
def test_threads_with_new_shapes_all_the_time(fast: OptimizedModel, switching: None) -> None:
    inputs = [torch.randn(1, 3, side, side) for side in SIDES]
    wanted = [fast.network.graph_module(x) for x in inputs]

    def work(number: int) -> None:
        for turn in range(3 * len(inputs)):
            index = (3 * number + turn) % len(inputs)
            torch.testing.assert_close(fast(inputs[index]), wanted[index], rtol=1e-4, atol=1e-5)
            if turn % 6 == number:
                fast.repack()  # another thread's plans go on

    assert in_threads(work) == []
    assert all(tensor.device.type == "cpu" for tensor in fast.state_dict().values())


@torch.no_grad()
def test_runs_of_one_shape_at_the_same_time(fast: OptimizedModel, switching: None) -> None:
    inputs = torch.randn(8, 2, 3, 32, 32)
    wanted = [fast(x) for x in inputs]
    current, entered = fast.network._plans, threading.Semaphore(0)
    assert current is not None
    program = current.program(inputs[0])
    with current.workspaces.lent(program.size) as taken:  # a run that does not end
        assert all(torch.equal(fast(x), y) for x, y in zip(inputs, wanted, strict=True))
        assert all(taken is not idle for idle in current.workspaces.idle)

    def work(number: int) -> None:
        for turn in range(20):
            index = (number + turn) % len(inputs)
            assert torch.equal(fast(inputs[index]), wanted[index])
        entered.release()

    assert in_threads(work) == []
    assert all(entered.acquire(blocking=False) for _ in range(4))
    assert len(current.workspaces.idle) <= 5  # no more than ran at the same time


@torch.no_grad()
def test_planning_only_reads_the_network(fast: OptimizedModel) -> None:
    part = fast.network
    tensors = [*part.parameters(), *part.buffers()]
    before = [(id(t), t.data_ptr(), t._version) for t in tensors]
    writes: list[str] = []

    class Guarded(dict[str, object]):
        def __setitem__(self, key: str, value: object) -> None:
            writes.append(key)
            super().__setitem__(key, value)

    for module in part.graph_module.modules():
        module._parameters = Guarded(module._parameters)
        module._buffers = Guarded(module._buffers)
    fast(torch.randn(1, 3, 40, 40))
    assert not writes
    after = [*part.parameters(), *part.buffers()]
    assert [(id(t), t.data_ptr(), t._version) for t in after] == before


@torch.no_grad()
def test_shapes_in_rotation_are_planned_once(
    fast: OptimizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[tuple[int, ...]] = []

    def counted(graph: object, x: Tensor, *rest: object) -> Program:
        planned.append(tuple(x.shape))
        return Program(graph, x, *rest)

    monkeypatch.setattr(plans, "Program", counted)
    inputs = [torch.randn(1, 3, side, side) for side in SIDES]
    first = [fast(x) for x in inputs]
    assert len(planned) == len(inputs)
    current = fast.network._plans
    assert current is not None
    packed = {key: tensor.data_ptr() for key, tensor in current.constants.items()}
    for _ in range(2):
        assert all(torch.equal(fast(x), y) for x, y in zip(inputs, first, strict=True))
    assert len(planned) == len(inputs)
    assert {key: tensor.data_ptr() for key, tensor in current.constants.items()} == packed
    assert len(current.workspaces.idle) == 1  # one after the other they need one


@torch.no_grad()
def test_plans_are_kept_by_memory(fast: OptimizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 48, 48)
    fast(small)
    current = fast.network._plans
    assert current is not None
    each = current.program(small).bytes
    assert 10_000 < each < 1_000_000
    monkeypatch.setattr(plans, "KEPT_BYTES", 2 * each + each // 2)
    for side in (33, 34, 32, 35):
        fast(torch.randn(1, 3, side, side))
    assert [key[0][2] for key in current.programs] == [32, 35]  # used last
    monkeypatch.setattr(plans, "KEPT_BYTES", 1)
    torch.testing.assert_close(fast(large), fast.network.graph_module(large), rtol=1e-4, atol=1e-5)
    assert [key[0][2] for key in current.programs] == [48]


def test_workspaces_are_kept_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Workspaces()
    with pool.lent(1000) as first, pool.lent(5000) as second:
        assert first is not second
    with pool.lent(900) as again:
        assert again is first  # the smallest that is large enough
    with pool.lent(6000) as larger:
        assert larger not in (first, second)
    assert pool.idle == [first, larger]  # it took the place of the one of 5,000
    monkeypatch.setattr(workspaces, "KEPT_BYTES", 4 * 6500)
    with pool.lent(800) as again:
        assert again is first
    assert pool.idle == [first]
    with pool.lent(100_000) as huge:
        pass
    assert pool.idle == [huge]  # calls like the last one need it
    with pool.lent(10) as little:
        assert little is not huge


@torch.no_grad()
@pytest.mark.parametrize("name", ["se_resnet8_cifar", "shufflenet_g3", "se_bn_inception"])
def test_what_lay_in_a_workspace_does_not_matter(name: str) -> None:
    model = create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, max(model.min_input_size, 33), max(model.min_input_size, 35))
    program = Program(Rewriter(model).run(), x, 2, {})
    wanted = program.run(x)
    for garbage in (torch.nan, 1e30):
        workspace = Workspace(program.size)
        workspace.memory.fill_(garbage)
        assert torch.equal(program.run(x, workspace), wanted)


def step(layer: nn.Module, _: str) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load(layer: nn.Module, _: str, *, assign: bool = False) -> None:
    state = {key: tensor + 1 for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=assign)


def set_data(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    weight = layer.get_parameter(name)
    weight.data = change(weight.data)


def all_but_extremes_halved(data: Tensor) -> Tensor:
    """In memory of its own; the second time that may be where the first one's lay."""
    sizes = data.abs()
    return torch.where((sizes == sizes.max()) | (sizes == sizes.min()), data, data / 2)


# Of a layer's weight with the given name.
EDITS: dict[str, Callable[[nn.Module, str], object]] = {
    "mul_": lambda layer, name: layer.get_parameter(name).mul_(2),
    "one number": lambda layer, name: layer.get_parameter(name)[0].view(-1)[3].add_(1),
    "data =": lambda layer, name: set_data(layer, name, lambda data: data * 2),
    "data = twice": lambda layer, name: [
        set_data(layer, name, all_but_extremes_halved) for _ in range(2)
    ],
    "data.mul_": lambda layer, name: layer.get_parameter(name).data.mul_(2),
    "data.zero_": lambda layer, name: layer.get_parameter(name).data.zero_(),
    "numpy": lambda layer, name: layer.get_parameter(name).numpy().__imul__(-1),
    "data, pruned": lambda layer, name: layer.get_parameter(name).data.mul_(
        layer.get_parameter(name).abs() > 0.01
    ),
    "another parameter": lambda layer, name: setattr(
        layer, name, nn.Parameter(layer.get_parameter(name) * 3, False)
    ),
    "bias": lambda layer, name: layer.get_parameter(name.replace("weight", "bias")).add_(1),
    "load_state_dict": load,
    "assigned": lambda layer, name: load(layer, name, assign=True),
    "optimizer": step,
}


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["Linear", "FusedConv", "SqueezeGate"])
def test_edited_weights_are_noticed(fast: OptimizedModel, kind: str, edit: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    before, plan = fast(x), fast.network._plans
    assert torch.equal(fast(x), before)
    assert fast.network._plans is plan  # nothing is packed anew without an edit
    layer = [m for m in fast.modules() if type(m).__name__ == kind][-1]
    EDITS[edit](layer, "weight1" if kind == "SqueezeGate" else "weight")
    found = fast(x)
    assert not torch.equal(found, before)
    wanted = fast.network.graph_module(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_edit_of_the_strides_alone_is_noticed() -> None:
    fast = optimize(nn.Sequential(nn.Conv2d(8, 8, 1)).eval(), torch.randn(1, 8, 4, 4))
    x = torch.randn(2, 8, 5, 5)
    before = fast(x)
    (weight,) = (p for p in fast.parameters() if p.ndim == 4)
    address = weight.data_ptr()
    weight.data = weight.data.transpose(0, 1)
    assert weight.data_ptr() == address
    assert not torch.equal(fast(x), before)
    torch.testing.assert_close(fast(x), fast.network.graph_module(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_new_head_is_used(fast: OptimizedModel) -> None:
    x = torch.randn(2, 3, 32, 32)
    fast(x)
    fast.network.graph_module.fc = nn.Linear(64, 9)
    found = fast(x)
    assert found.shape == (2, 9)
    torch.testing.assert_close(found, fast.network.graph_module(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_layer_that_would_not_be_used_is_refused(fast: OptimizedModel) -> None:
    x = torch.randn(2, 3, 32, 32)
    fast(x)
    for model in (fast, fast.network):
        with pytest.raises(UserError, match=r"has no fc to replace .* set it in the original"):
            model.fc = nn.Linear(64, 9)
    assert "fc" not in fast._modules
    fast.network.graph_module.conv1 = nn.Conv2d(3, 16, 3)
    with pytest.raises(UserError, match="does not call conv1, which was put into it"):
        fast(x)


@torch.no_grad()
def test_edits_of_inference_tensors_and_not_a_number(fast: OptimizedModel) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        made = optimize(network(), x)
        made(x)
        next(iter(made.parameters())).mul_(2)
        found = made(x)
        torch.testing.assert_close(found, made.network.graph_module(x), rtol=1e-4, atol=1e-5)
    fast.network.graph_module.fc.weight[0, 0] = torch.nan
    fast(x)
    plan = fast.network._plans
    fast(x)
    assert fast.network._plans is plan


@torch.no_grad()
def test_repack_after_an_edit_that_leaves_no_trace(fast: OptimizedModel) -> None:
    """Neither counted, nor of the largest or the smallest number: what `repack` is for."""
    x = torch.randn(2, 3, 32, 32)
    weight = fast.network.graph_module.fc.weight
    fast(x)
    order = weight.data.abs().flatten().argsort()
    weight.data.view(-1)[order[10:-10]] = 0
    fast.repack()
    torch.testing.assert_close(fast(x), fast.network.graph_module(x), rtol=1e-4, atol=1e-5)


def test_weights_that_ask_for_gradients_get_them(fast: OptimizedModel) -> None:
    x = torch.randn(2, 3, 32, 32)
    assert not fast(x).requires_grad
    fast.requires_grad_(True)
    fast(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in fast.parameters())


@torch.no_grad()
def test_a_pickled_copy_plans_for_itself(fast: OptimizedModel) -> None:
    x = torch.randn(2, 3, 32, 32)
    wanted = fast(x)
    other = pickle.loads(pickle.dumps(fast))
    assert other.network._plans is None
    next(iter(fast.parameters())).zero_()
    assert torch.equal(other(x), wanted)


def test_memory_of_inference_mode_serves_outside_of_it() -> None:
    """What PyTorch computes between the kernels is written into it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 3, 9, 9)
    fast = optimize(model, x, measure=False)
    fast.repack()
    with torch.inference_mode():
        wanted = fast(x).clone()
    assert torch.equal(fast(x), wanted)


@torch.no_grad()
def test_parameters_that_the_graph_reads_itself() -> None:
    """They are looked up once; an edit is seen, and another one in their place, too."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(7), nn.Conv2d(8, 4, 1)).eval()
    norm = type("Norm", (nn.Module,), {"forward": lambda m, x: F.layer_norm(x, (7,), m.w)})()
    norm.w = nn.Parameter(torch.rand(7))
    model[1] = norm
    x = torch.randn(1, 3, 9, 9)
    fast = optimize(model, x)
    program = fast.network.plans(x).program(x)
    assert sum(isinstance(part, TorchStep) for part in program.parts) == 1
    for change in (lambda w: w.mul_(2), lambda w: w.data.copy_(torch.rand(7))):
        change(fast.network.graph_module.get_parameter("1.w"))
        change(norm.w)
        norm.w.copy_(fast.network.graph_module.get_parameter("1.w"))
        torch.testing.assert_close(fast(x), model(x))
    norm.w = nn.Parameter(torch.rand(7))
    fast.network.graph_module.get_submodule("1").w = norm.w
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_works_in_memory_of_its_own() -> None:
    """A server that forks its workers after the first run: their maps are not this process's."""
    memory = allocate(1 << 20)
    child = os.fork()
    if not child:
        memory[0] = memory[-1] = 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory[0] == memory[-1] == 0
