"""What a run takes from its machine: processes, random states; what its digits hang on."""

import os
import random
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

import senet
from senet.errors import UserError
from senet.support.device import choose_device
from senet.training.config import RunConfig


def accelerator_of(config: RunConfig) -> Accelerator:
    """accelerate's view of the device, the processes and the precision of a run.

    Raises:
        UserError: the device is missing, or it, the processes and the options do not go together.
    """
    device, precision = choose_device(config.device), config.recipe.mixed_precision
    if precision == "fp16" and device.type != "cuda":
        raise UserError("mixed_precision 'fp16' needs a CUDA GPU; use 'bf16' or 'no'")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise UserError("accelerate launch: leave out --use_fsdp, and give senet --parallel fsdp")
    # accelerate keeps one state a process and refuses a second run with another precision or
    # device; it offers no public way to begin anew. The process group of torchrun stays.
    alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    handlers = []
    if config.timeout is not None:
        # Later than the watchdog, whose stacks tell more than a collective's error.
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout + 60)))
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=handlers
    )
    if config.parallel == "fsdp" and accelerator.num_processes == 1:
        raise UserError(
            "FSDP shards a network over several processes, and this is one: begin with torchrun "
            "--nproc-per-node=N -m senet train, or give --parallel ddp"
        )
    return accelerator


def environment(config: RunConfig) -> dict[str, str | int]:
    """What the last digits of a result on the CPU depend on, beside the run's options."""
    return {
        "senet": senet.__version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
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
