"""Inception modules, whose branches and SE run as one operator, against their separate modules."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.helpers.marks import separate_passes
from torch import Tensor, nn

from senet import ops
from senet.models.inception import Branch, Conv, InceptionModule, average_pool, max_pool_half
from senet.models.options import SEOptions

FORKED = (
    Branch((Conv("one", 12, 1),)),
    Branch((Conv("reduce", 6, 1),), fork=(Conv("row", 7, (1, 3)), Conv("column", 9, (3, 1)))),
    Branch((Conv("pool", 5, 1),), average_pool),
)
HALVING = (
    Branch((Conv("a", 6, 1), Conv("b", 11, 3, 2, 0))),
    Branch(pool=max_pool_half),
)


def module(branches: tuple[Branch, ...] = FORKED, **options: Any) -> InceptionModule:
    torch.manual_seed(4)
    found = InceptionModule(10, branches, SEOptions(reduction=4, **options))
    for name, parameter in found.named_parameters():
        if "bn" in name:
            nn.init.normal_(parameter, 0.5)
    return found.double()


def separate(block: InceptionModule, x: Tensor) -> Tensor:
    """The modules one after the other, each map written and read again."""
    outputs = []
    for branch in block.branches:
        y = x if branch.pool is None else branch.pool(x)
        for conv in branch.convs:
            layer = getattr(block, conv.name)
            y = torch.relu(layer.bn(layer.conv(y)))
        forked = [getattr(block, conv.name) for conv in branch.fork]
        outputs += [torch.relu(layer.bn(layer.conv(y))) for layer in forked] or [y]
    out = torch.cat(outputs, 1)
    if block.se is None:
        return out
    return out * block.se.excite(out)


def results(
    f: Callable[[InceptionModule, Tensor], Tensor], block: InceptionModule, x: Tensor
) -> dict[str, Tensor]:
    """Output, gradients and buffers of a copy of the module."""
    block, x = deepcopy(block), x.clone().requires_grad_()
    y = f(block, x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, **dict(block.named_buffers())}
    return found | {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def assert_same(block: InceptionModule, x: Tensor) -> None:
    expected = results(separate, block, x)
    for implementation in ("auto", "algebra", "reference"):
        with ops.use(implementation):
            found = results(InceptionModule.__call__, block, x)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


X = torch.randn(3, 10, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("branches", [FORKED, HALVING], ids=["forked", "halving"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_equals_the_separate_modules(
    branches: tuple[Branch, ...], layout: torch.memory_format
) -> None:
    x = X.to(memory_format=layout)
    block = module(branches)
    plain = module(branches)
    plain.se = None
    for training in (True, False):
        assert_same(block.train(training), x)
        assert_same(plain.train(training), x)
    assert block.train()(x).is_contiguous(memory_format=layout)


def test_one_operator_runs_the_end_of_the_module() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        module().float().train()(X.float())
    assert called.count("senet.join.default") == 1
    assert called.count("senet.tail.default") == 1  # behind `reduce`, which ends no branch
    assert not any("cat" in name or "mean" in name for name in called)


def test_frozen_and_missing_norms() -> None:
    block = module().train()
    block.one.bn.eval()
    block.row.bn.weight.requires_grad_(False)
    assert_same(block, X)
    block.column.bn = nn.BatchNorm2d(9, track_running_stats=False, affine=False).double()
    assert_same(block, X)


@separate_passes
@pytest.mark.parametrize("where", ["one", "row.bn", "pool.conv", "se", "se.gate"])
def test_hooks_are_called(where: str) -> None:
    """A hooked layer runs by itself, so that the hook sees its output; the numbers stay."""
    block = module().train()
    expected = results(separate, block, X)
    seen: list[Tensor] = []
    block.get_submodule(where).register_forward_hook(lambda m, i, output: seen.append(output))
    found = results(InceptionModule.__call__, block, X)
    assert len(seen) == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


@separate_passes
@pytest.mark.parametrize(
    "options", [{"squeeze": "max"}, {"squeeze": "none"}, {"gate": "tanh"}], ids=str
)
def test_other_blocks(options: dict[str, Any]) -> None:
    assert_same(module(**options).train(), X)


def test_mixed_precision() -> None:
    block = module().float().train()
    expected = results(separate, block, X.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(InceptionModule.__call__, block, X.float())
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).norm()
        assert difference <= 0.03 * value.double().norm() + 1e-4, name


def test_exported_graph_holds_pytorchs_own_operators() -> None:
    block = module().float().eval()
    program = torch.export.export(block, (X.float(),))
    assert not any("senet" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X.float()), block(X.float()))
