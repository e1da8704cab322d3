"""The operators by PyTorch's own functions, which small maps take on a GPU."""

import pytest
import torch
from join_cases import Join, joins
from join_cases import oracle as join_oracle
from join_cases import run as run_join
from ops_cases import SHORTCUTS, Case, oracle, run
from tolerances import assert_close, error

from senet import ops
from senet.ops import BRANCH_ACTIVATIONS, choice


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("training", [True, False])
def test_tails(shortcut: str, training: bool) -> None:
    for options in ({}, {"gated": False}, {"activation": "silu"}, {"relu": False, "affine": False}):
        case = Case(shortcut=shortcut, training=training, dtype=torch.float64, **options)
        assert_close(run("pytorch", case), oracle(case), case.dtype, case)


@pytest.mark.parametrize("activation", BRANCH_ACTIVATIONS)
def test_joins(activation: str) -> None:
    one = Join(kinds="b", channels=(21,), activation=activation, hidden_activation="silu")
    for case in (one, *joins(layout="channels_last", joined=activation)):
        found, wanted = run_join("pytorch", case), join_oracle(case)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert error(found[name], value) <= 1e-5, (name, case)


def test_maps_are_rounded_and_the_gate_is_not() -> None:
    """Each of some five functions rounds to 8 bits; statistics stay float32."""
    case = Case(dtype=torch.bfloat16)
    found, wanted = run("pytorch", case), oracle(case)
    assert found["y"].dtype == torch.bfloat16
    assert error(found["y"], wanted["y"]) <= 5 * 2**-9
    for name in ("running_mean", "running_var"):
        assert error(found[name], wanted[name]) <= 1e-5


def test_only_large_maps_are_worth_their_launches() -> None:
    small = torch.empty(128, 64, 64, 63, device="meta", dtype=torch.bfloat16)
    large = torch.empty(128, 64, 64, 64, device="meta", dtype=torch.bfloat16)
    assert not choice.large(small)
    assert choice.large(large)
    assert choice.large(small.float())
    assert choice.large(small, small)


def test_modules_with_small_inputs_run_as_they_are_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule alone, as there is no GPU."""
    monkeypatch.setattr(choice, "resolve", lambda _: "triton")
    small = torch.empty(128, 64, 32, 31, device="meta", dtype=torch.bfloat16)
    large = torch.empty(128, 64, 32, 32, device="meta", dtype=torch.bfloat16)
    assert choice.resolve_maps(large) == "pytorch"
    assert choice.resolve_maps(large, large, large, large) == "triton"
    assert not choice.is_worth_it(small)
    assert choice.is_worth_it(large)
    with ops.use("reference"):
        assert choice.is_worth_it(small)
