"""The kernels' activations against float64, over all magnitudes of float32."""

import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from senet import kernels
from senet.inference.modules import FusedConv, Pointwise
from senet.inference.program import Program
from senet.ops.activations import ACTIVATIONS, LINEAR, Activation

pytestmark = pytest.mark.skipif(bool(kernels.MISSING), reason=kernels.MISSING)

# Units in the last place, as activation.h states them.
ULPS = dict.fromkeys(ACTIVATIONS, 4.0) | dict.fromkeys(
    ("linear", "relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"), 3.0
)
ULPS["gelu"] = 7.0
VANISHING = 2.0**-120
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    # PyTorch's own formulas cancel on the left, in float64 too.
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5)),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * tanh_argument(x)),
}


def tanh_argument(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def magnitudes() -> Tensor:
    """Numbers of all exponents and signs, denormal ones and zeros too, and some near 0 to 16."""
    patterns = np.arange(-(2**31), 2**31, 2**13 + 3, dtype=np.int64).astype(np.int32)
    values = torch.from_numpy(patterns).view(torch.float32)
    values = torch.cat([values, torch.linspace(-16, 16, 100_001), torch.tensor([0.0, -0.0])])
    return values[values.isfinite()]


def called(module: nn.Module, *inputs: str) -> fx.GraphModule:
    """A graph that calls a module of the rewriter's."""
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    return fx.GraphModule(nn.ModuleDict({"inner": module}), graph)


def native(module: nn.Module, x: Tensor) -> Tensor:
    program = Program(called(module), x, 2, {})
    assert len(program.parts) == 1
    return program.run(x)


def alone(activation: Activation, x: Tensor) -> Tensor:
    """The activation of numbers (count,) through the kernels."""
    module = Pointwise()
    module.activation = activation
    padded = torch.nn.functional.pad(x, (0, -len(x) % 40))
    found: Tensor = native(module, padded.view(1, 40, 1, -1))
    return found.flatten()[: len(x)]


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_exact_to_a_few_units_in_the_last_place(name: str) -> None:
    activation, x = Activation(name, 0.3), magnitudes()
    found = alone(activation, x).double()
    wanted = EXACT.get(name, activation)(x.double())
    bound = torch.full_like(wanted, ULPS[name])
    if name == "gelu_tanh":
        bound += 6 * tanh_argument(x.double()).abs()
    units = torch.from_numpy(np.spacing(wanted.float().abs().numpy())).double()
    worst = ((found - wanted).abs() - VANISHING).clamp(min=0) / units / bound
    assert worst.nan_to_num(math.inf).max() <= 1, x[worst.argmax()]


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rounding_of_activations_leans_to_no_side(name: str) -> None:
    """Each layer of a network would multiply a small factor into what the one before has made."""
    activation, x = Activation(name, 0.25), 2 * torch.randn(200_000)
    found = alone(activation, x).double()
    wanted = EXACT.get(name, activation)(x.double())
    leaning = ((found - wanted) * wanted.sign()).sum() / wanted.abs().sum()
    assert leaning.abs() < 3e-9


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_what_is_no_number(name: str) -> None:
    activation, x = Activation(name, 0.3), torch.tensor([math.inf, -math.inf, math.nan])
    found, wanted = alone(activation, x), activation(x.double()).float()
    assert torch.equal(found.isnan(), wanted.isnan())
    torch.testing.assert_close(found, wanted, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("slopes", [1, 37])
def test_slopes_of_a_prelu(slopes: int) -> None:
    module, x = Pointwise(), torch.randn(2, 37, 5, 5)
    module.slopes = nn.Parameter(torch.linspace(-1, 2, slopes), False)
    torch.testing.assert_close(native(module, x), module(x))


# channels in, channels out, kernel, groups
CONVOLUTIONS = {
    "1x1": (40, 37, 1, 1),
    "patches": (8, 24, 5, 1),
    "F(4,3)": (16, 37, 3, 1),
    "depthwise": (37, 37, 3, 37),
    "grouped": (24, 24, 3, 6),
    "wide groups": (32, 48, 3, 2),
}


def ending_convolution(name: str, activation: Activation) -> FusedConv:
    channels, outputs, kernel, groups = CONVOLUTIONS[name]
    conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, groups=groups)
    module = FusedConv(conv)
    module.activation = activation
    return module


@torch.no_grad()
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "prelu"])
def test_convolutions_end_in_any_activation(name: str, activation: str) -> None:
    prelu = activation == "prelu"
    module = ending_convolution(name, LINEAR if prelu else Activation(activation, 0.3))
    if prelu:
        module.slopes = nn.Parameter(torch.rand(len(module.bias)), False)
    x = 3 * torch.randn(2, CONVOLUTIONS[name][0], 9, 10)
    found = native(module, x)
    wanted = module.double()(x.double())
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_sets_of_instructions(isa: str) -> None:
    if isa == "avx2" and kernels.instruction_set() == "baseline":
        pytest.skip("this processor has no AVX2")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            __file__,
            "-k",
            "not other_sets",
            "-p",
            "no:cacheprovider",
        ],
        env=os.environ | {"SENET_ISA": isa, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
