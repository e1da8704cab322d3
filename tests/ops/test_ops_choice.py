"""Which implementation runs, and what is refused before anything runs."""

import os
import subprocess
import sys

import pytest
import torch
from ops_cases import Case, apply, inputs

from senet import ops
from senet.errors import UserError
from senet.ops import algebra, cpu, operators


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the implementations in the order in which they are called."""
    called: list[str] = []

    def record(module: object, function: str, name: str) -> None:
        real = getattr(module, function)

        def recorded(*arguments: object, **options: object) -> object:
            called.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(module, function, recorded)

    record(cpu.tail, "forward", "cpu")
    record(algebra.tail, "forward", "algebra")
    record(operators.TAIL, "reference", "reference")
    return called


def test_use_as_context_and_as_default(calls: list[str]) -> None:
    t = inputs(Case())
    apply(t, Case())
    with ops.use("reference"):
        apply(t, Case())
        with ops.use("algebra"):
            apply(t, Case())
        apply(t, Case())
    ops.use("algebra")
    apply(t, Case())
    ops.use("auto")
    apply(t, Case())
    assert calls == ["cpu", "reference", "algebra", "reference", "algebra", "cpu"]


def test_choice_is_restored_after_an_error(calls: list[str]) -> None:
    with pytest.raises(KeyError), ops.use("reference"):
        raise KeyError
    apply(inputs(Case()), Case())
    assert calls == ["cpu"]


def test_auto_leaves_what_the_kernels_cannot_take_to_the_algebra(calls: list[str]) -> None:
    t = {k: v.half() for k, v in inputs(Case()).items()}
    apply(t, Case())
    assert calls == ["algebra"]
    with ops.use("cpu"), pytest.raises(UserError, match=r"take float32.*float16.*auto"):
        apply(t, Case())


def test_meta_tensors(calls: list[str]) -> None:
    t = {k: v.to("meta") for k, v in inputs(Case()).items()}
    assert apply(t, Case()).shape == t["x"].shape
    assert calls == ["algebra"]


def test_unknown_implementation() -> None:
    with pytest.raises(UserError, match=r"'cuda'.*auto, reference, algebra, pytorch, cpu, triton"):
        ops.use("cuda")


@pytest.mark.parametrize(("value", "code"), [("reference", 0), ("fast", 1)])
def test_environment_variable(value: str, code: int) -> None:
    script = "from senet.ops import choice; print(choice._implementation)"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "SENET_OPS": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert ("SENET_OPS is 'fast'" in result.stderr) if code else (result.stdout == "reference\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.ones(5, 20)}, "w1 has shape \\(5, 20\\); for an input of 21 channels"),
        ({"w1": torch.ones(21, 5)}, "they are \\(h,C\\) and \\(C,h\\)|w1 has shape"),
        ({"b2": torch.ones(5)}, "b2 has shape \\(5,\\)"),
        ({"weight": torch.ones(20)}, "weight has shape \\(20,\\); the input needs \\(21,\\)"),
        ({"shortcut": torch.ones(3, 21, 5, 1)}, "shortcut has shape"),
        ({"x": torch.ones(3, 21, 5, 7, dtype=torch.int32)}, "int32; it must be a floating type"),
        ({"x": torch.ones(3, 21)}, "it must be \\(N, C, \\*spatial\\)"),
        ({"running_mean": None}, "running_mean and running_var: give both or neither"),
        ({"w2": None}, "give both weights, or None for all four"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    t = {**inputs(Case()), **change}
    with pytest.raises(UserError, match=message):
        apply(t, Case())


def test_bad_gate_and_shortcut_norm() -> None:
    t = inputs(Case())
    with pytest.raises(UserError, match="gate is 'swish'; choose one of sigmoid"):
        apply(t, Case(gate="swish"))
    rest = (t["weight"], t["bias"], t["running_mean"], t["running_var"])
    options = {"training": False, "momentum": 0.1, "eps": 1e-5}
    norm = ops.BatchNorm(None, None, None, None)
    with pytest.raises(UserError, match="without a shortcut"):
        ops.bn_se_add_relu(t["x"], None, *rest, shortcut_norm=norm, **options)
    with pytest.raises(UserError, match="to both normalizations or to neither"):
        ops.bn_se_add_relu(t["x"], t["shortcut"], *rest, shortcut_norm=norm, **options)
