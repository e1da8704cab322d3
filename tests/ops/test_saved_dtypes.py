"""What the operators return besides the map: in the type that sums are kept in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_cases import TRITON
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from senet import ops

pytestmark = pytest.mark.skipif(
    TRITON or not ops.implementations()["cpu"].available, reason="tests the C++ kernels"
)


class Returned(TorchDispatchMode):
    """Keeps what operators of this package return."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith("senet."):
            self.tensors += [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = {"weight": (8,), "bias": (8,), "w1": (2, 8), "b1": (2,), "w2": (8, 2), "b2": (8,)}
    return {name: torch.randn(shape, dtype=exact) for name, shape in values.items()}


def tail(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    gate = (p["w1"], p["b1"], p["w2"], p["b2"])
    norm = (p["weight"], p["bias"], None, None)
    return ops.bn_se_add_relu(x, x, *norm, *gate, training=True, momentum=0.1, eps=1e-5)


def excitation(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return ops.squeeze_excite(x, p["w1"], p["b1"], p["w2"], p["b2"])


def join(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    norm = ops.BatchNorm(p["weight"], p["bias"], None, None, 0.1, 1e-5)
    w1 = torch.cat([p["w1"], p["w1"]], 1)
    w2, b2 = torch.cat([p["w2"], p["w2"]]), torch.cat([p["b2"], p["b2"]])
    return ops.bn_relu_concat_se([x, x], [norm, None], w1, p["b1"], w2, b2, training=[True, False])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [tail, excitation, join])
def test_sums_and_gates_are_kept_in_the_accumulators_type(
    function: Callable[[Tensor, dict[str, Tensor]], Tensor],
    dtype: torch.dtype,
) -> None:
    """Kernels write into these buffers: one of half the size would be overrun without a word."""
    x = torch.randn(2, 8, 5, 4).to(dtype).to(memory_format=torch.channels_last)
    p = parameters(dtype)
    for leaf in (x, *p.values()):
        leaf.requires_grad_()
    with ops.use("cpu"), Returned() as returned:
        function(x, p).sum().backward()
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    assert len(returned.tensors) >= 5
    for tensor in returned.tensors:
        if tensor.is_floating_point():
            assert tensor.dtype == (dtype if tensor.ndim == 4 else accumulator), tensor.shape
