"""Variables of `accelerate launch`: a run does what its options say, or is refused in one line."""

import os
from collections.abc import Callable

import pytest

from senet.errors import UserError
from senet.training.config import RunConfig
from senet.training.machine import accelerator_of

Make = Callable[..., RunConfig]

# What `accelerate launch --multi_gpu` sets unasked.
UNASKED = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_USE_FSDP": "",
}


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--accumulate"),
        ("GRADIENT_ACCUMULATION_STEPS", "auto", "--accumulate"),
        ("MIXED_PRECISION", "bf16", "--mixed-precision"),
        ("MIXED_PRECISION", "fp8", "--mixed-precision"),
        ("DYNAMO_BACKEND", "INDUCTOR", "--compile"),
        ("DYNAMO_BACKEND", "nonsense", "--compile"),
        ("USE_FSDP", "1", "--parallel fsdp"),
        ("USE_DEEPSPEED", "true", "DeepSpeed"),
        ("USE_MEGATRON_LM", "true", "Megatron"),
        ("USE_PARALLELISM_CONFIG", "true", "--parallel"),
        ("USE_SAGEMAKER", "true", "SageMaker"),
        ("TORCH_DEVICE", "cuda:0", "--device"),
    ],
)
def test_what_asks_for_something_else_is_refused(
    name: str, value: str, remedy: str, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=rf"ACCELERATE_{name} is '{value}'.*{remedy}"):
        accelerator_of(tiny_config(device="cpu"))


def test_what_agrees_or_is_unasked_changes_nothing(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in UNASKED.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    accelerator = accelerator_of(tiny_config(device="cpu"))
    assert dict(os.environ) == before
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value.lower() == "no"
    assert (accelerator.device.type, accelerator.mixed_precision) == ("cpu", "no")

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    config = tiny_config(device="cpu", recipe_mixed_precision="bf16")
    assert accelerator_of(config).mixed_precision == "bf16"


def test_accelerate_reads_none_of_them(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not those that nobody has thought of, and those whose values it would choke on."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "nonsense")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "nonsense")
    monkeypatch.setenv("ACCELERATE_PARALLELISM_CONFIG_TP_SIZE", "nonsense")
    assert accelerator_of(tiny_config(device="cpu")).num_processes == 1
