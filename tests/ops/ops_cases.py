"""Inputs for the operator's tests, and one function that runs any implementation on them.

SENET_TEST_TRITON=1 turns the tests of all fast implementations to the Triton kernels, and
SENET_TEST_DEVICE=cuda to a GPU: see test_ops_triton.py.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from senet import ops

SHORTCUTS = ("none", "plain", "normalized")
PARAMETERS = ("weight", "bias", "shortcut_weight", "shortcut_bias", "w1", "b1", "w2", "b2")
RUNNING = ("running_mean", "running_var", "shortcut_mean", "shortcut_var")
TRITON = os.environ.get("SENET_TEST_TRITON") == "1"
DEVICE = os.environ.get("SENET_TEST_DEVICE", "cpu")
FAST = ("triton",) if TRITON else ("algebra", "cpu")
KERNELS = "cpu" if DEVICE == "cpu" else "triton"  # that run on the device
IMPLEMENTATIONS = ("reference", "algebra", KERNELS)
CPP = pytest.mark.skipif(DEVICE != "cpu", reason="about the C++ kernels, not about a GPU")
LAYOUTS = ("channels_last", "contiguous", "strided", "permuted")


@dataclass(frozen=True)
class Case:
    """What of the tail is there, and the tensors' sizes."""

    N: int = 3
    C: int = 21
    spatial: tuple[int, ...] = (5, 7)
    hidden: int = 5
    shortcut: str = "plain"
    gated: bool = True
    relu: bool = True
    activation: str = "relu"
    training: bool = True
    gate: str = "sigmoid"
    layout: str = "channels_last"
    dtype: torch.dtype = torch.float32
    biases: bool = True
    affine: bool = True


def in_layout(t: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    match layout:
        case "channels_last" if t.ndim in (4, 5):
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return t.to(memory_format=formats[t.ndim])
        case "strided":
            return torch.stack((t, t), -1).flatten(-2)[..., ::2]
        case "permuted":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t


def inputs(case: Case) -> dict[str, Tensor]:
    """Random x, shortcut, gradient of y and parameters, the maps rounded to the case's dtype."""
    draw = torch.Generator("cpu").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")
        return numbers.to(DEVICE)

    C, h, shape = case.C, case.hidden, (case.N, case.C, *case.spatial)
    numbers = {
        "x": 2 * normal(*shape) + 1,
        "shortcut": normal(*shape),
        "gradient": normal(*shape),
        "weight": normal(C) + 1,
        "bias": normal(C),
        "running_mean": normal(C),
        "running_var": normal(C).abs() + 0.5,
        "shortcut_weight": normal(C) + 1,
        "shortcut_bias": normal(C),
        "shortcut_mean": normal(C),
        "shortcut_var": normal(C).abs() + 0.5,
        "w1": normal(h, C) / C**0.5,
        "b1": normal(h),
        "w2": normal(C, h) / h**0.5,
        "b2": normal(C),
    }
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name, t in numbers.items():
        if name in ("x", "shortcut", "gradient"):
            numbers[name] = in_layout(t.to(case.dtype), case.layout)
        else:
            numbers[name] = t.to(exact)
    return numbers


def apply(t: dict[str, Tensor], case: Case) -> Tensor:
    """The public function that the case needs, on tensors named as in `inputs`."""
    gate = [t["w1"], t["b1"] if case.biases else None, t["w2"], t["b2"] if case.biases else None]
    norms: list[list[Tensor | None]] = [
        [t["weight"], t["bias"], t["running_mean"], t["running_var"]],
        [t["shortcut_weight"], t["shortcut_bias"], t["shortcut_mean"], t["shortcut_var"]],
    ]
    if not case.affine:
        for norm in norms:
            norm[:2] = [None, None]
    return ops.bn_se_add_relu(
        t["x"],
        None if case.shortcut == "none" else t["shortcut"],
        *norms[0],
        *(gate if case.gated else [None] * 4),
        training=case.training,
        momentum=0.1,
        eps=1e-5,
        gate=case.gate,
        relu=case.relu,
        activation=case.activation,
        shortcut_norm=ops.BatchNorm(*norms[1], 0.2, 1e-3)
        if case.shortcut == "normalized"
        else None,
    )


def run(
    implementation: str,
    case: Case,
    numbers: dict[str, Tensor] | None = None,
    gradients: Iterable[str] = ("x", "shortcut", *PARAMETERS),
) -> dict[str, Tensor]:
    """y, the running statistics afterwards and all gradients that are asked for and exist."""
    given = inputs(case) if numbers is None else numbers
    wanted = set(gradients)
    t = {name: value.detach().clone() for name, value in given.items()}
    for name, value in given.items():  # clone() loses unusual strides
        if value.stride() != t[name].stride():
            t[name] = in_layout(value.detach(), case.layout)
        if name in wanted:
            t[name] = t[name].requires_grad_()
    with ops.use(implementation):
        y = apply(t, case)
        if y.requires_grad:
            y.backward(t["gradient"].to(y.dtype))
    results = {"y": y.detach(), **{name: t[name] for name in RUNNING}}
    results |= {name: t[name].grad for name in wanted if t[name].grad is not None}
    return results


def oracle(
    case: Case, gradients: Iterable[str] = ("x", "shortcut", *PARAMETERS)
) -> dict[str, Tensor]:
    """The reference implementation on the same numbers in float64."""
    numbers = {name: value.double() for name, value in inputs(case).items()}
    return run("reference", replace(case, dtype=torch.float64), numbers, gradients)


def parts(**fixed: object) -> Iterator[Case]:
    """Every combination of the tail's parts."""
    for shortcut in SHORTCUTS:
        for gated in (True, False):
            for relu in (True, False):
                for training in (True, False):
                    chosen = {"shortcut": shortcut, "gated": gated, "relu": relu}
                    yield Case(**{**chosen, "training": training, **fixed})
