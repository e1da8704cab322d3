"""What a run takes from its machine: processes, random states; what its digits hang on."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

import senet
from senet import kernels
from senet.errors import UserError
from senet.ops import convolution
from senet.support.device import choose_device
from senet.training.config import RunConfig

PREFIX = "ACCELERATE_"
_FALSE = ("0", "false", "no", "n", "f", "off")
_HARMLESS = ("ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")  # no result depends on them


def accelerator_of(config: RunConfig) -> Accelerator:
    """accelerate's view of the device, the processes and the precision of a run.

    Raises:
        UserError: the device is missing, or it, the processes and the options do not go together;
            or a variable of `accelerate launch` asks for something else than the run.
    """
    device, precision = choose_device(config.device), config.recipe.mixed_precision
    if precision == "fp16" and device.type != "cuda":
        raise UserError("mixed_precision 'fp16' needs a CUDA GPU; use 'bf16' or 'no'")
    _refuse_launcher(device, precision)
    # accelerate keeps one state a process and refuses a second run with another precision or
    # device; it offers no public way to begin anew. The process group of torchrun stays.
    alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    handlers = []
    if config.timeout is not None:
        # Later than the watchdog, whose stacks tell more than a collective's error.
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout + 60)))
    with _own_options():
        accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=handlers
        )
    if config.parallel == "fsdp" and accelerator.num_processes == 1:
        raise UserError(
            "FSDP shards a network over several processes, and this is one: begin with torchrun "
            "--nproc-per-node=N -m senet train, or give --parallel ddp"
        )
    return accelerator


def _refuse_launcher(device: torch.device, precision: str) -> None:
    """Refuse what the variables of `accelerate launch`, also left over from one, ask for.

    What a run does is said by its own options and stands in its config.toml. What the launcher
    sets unasked (such as one gradient accumulation step) is no wish.
    """

    def asks(name: str, *harmless: str) -> str | None:
        value = os.environ.get(PREFIX + name, "").strip().lower()
        return None if value in ("", *harmless) else value

    remedies = {
        "USE_FSDP": "give senet --parallel fsdp",
        "USE_DEEPSPEED": "senet has no DeepSpeed",
        "USE_MEGATRON_LM": "senet has no Megatron-LM",
        "USE_PARALLELISM_CONFIG": "senet shares networks by --parallel",
        "USE_SAGEMAKER": "senet has no launcher of SageMaker",
    }
    found = {name: remedy for name, remedy in remedies.items() if asks(name, *_FALSE)}
    if asks("GRADIENT_ACCUMULATION_STEPS", "1"):
        found["GRADIENT_ACCUMULATION_STEPS"] = "give senet --accumulate"
    if asks("DYNAMO_BACKEND", "no"):
        found["DYNAMO_BACKEND"] = "give senet --compile"
    if asks("MIXED_PRECISION", "no", precision):
        found["MIXED_PRECISION"] = "give senet --mixed-precision"
    if device.type != "cpu" and asks("USE_CPU", *_FALSE):
        found["USE_CPU"] = "give senet --device cpu"
    if (place := asks("TORCH_DEVICE")) and place.partition(":")[0] != device.type:
        found["TORCH_DEVICE"] = "give senet --device"
    for name, remedy in found.items():
        value = os.environ[PREFIX + name]
        raise UserError(
            f"{PREFIX}{name} is {value!r}, by accelerate launch or left over from it, which is not "
            f"what this run does: {remedy}, and take it out of the launcher's options, or unset it"
        )


@contextmanager
def _own_options() -> Iterator[None]:
    """Hide the variables of `accelerate launch`, some of which go before arguments."""
    names = [name for name in os.environ if name.startswith(PREFIX) and name not in _HARMLESS]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def environment(config: RunConfig) -> dict[str, str | int]:
    """What the last digits of a result on the CPU depend on, beside the run's options."""
    return {
        "senet": senet.__version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "convolutions": f"{convolution.chosen()} {kernels.instruction_set()}".strip(),
        "parallel": config.parallel,
    }


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all random number generators, in plain containers and tensors."""
    numpy_state = dict(np.random.get_state(legacy=False))  # noqa: NPY002 - see set_random_state
    inner = dict(numpy_state["state"])
    numpy_state["state"] = {"key": inner["key"].tolist(), "pos": int(inner["pos"])}
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`; `state` is used up."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002 - the global generator is meant
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"], device)
