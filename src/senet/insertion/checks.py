"""What `insert` refuses, before it changes anything."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from senet.errors import UserError

RECORD = "senet_insertion"  # attribute of a model with inserted blocks: what `remove` must undo


def check_model(model: nn.Module) -> None:
    """Raise UserError for wrapped, compiled, scripted and uninitialised models, with the remedy."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, RECORD):
        raise UserError(
            "the model already has SE blocks of senet.insert; senet.remove(model) first"
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        inside = f" ({name})" if name else ""
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or (
            kind in ("FullyShardedDataParallel", "FSDPModule")
            or any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
        ):
            raise UserError(
                f"model is wrapped in {kind}{inside}, which would not see the new parameters; "
                "insert into model.module first and wrap afterwards"
            )
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UserError(
                f"model is compiled{inside}; insert before torch.compile (the original of a "
                "compiled model is model._orig_mod)"
            )
        if isinstance(module, torch.jit.ScriptModule) and not name:
            raise UserError("model is scripted; insert before torch.jit.script or torch.jit.trace")
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values()):
            raise UserError(f"{name} is not initialised yet; run the model once before insert")


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise UserError for what is no optimizer of the model's parameters."""
    known = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"optimizers must be torch optimizers, got {type(optimizer).__name__}")
        params = (p for group in optimizer.param_groups for p in group["params"])
        if not any(id(p) in known for p in params):
            raise UserError(
                f"{type(optimizer).__name__} trains no parameter of this model; pass the "
                "optimizer that was made from model.parameters()"
            )


def example_arguments(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """What the model is called with: the example, or zeros of the model's own input size.

    Raises:
        UserError: there is no example, and the model says no size.
    """
    if isinstance(example, tuple):
        return example
    if example is not None:
        return (example,)
    size = getattr(model, "input_size", None)
    if size is None:
        for name in ("pretrained_cfg", "default_cfg"):  # timm
            config = getattr(model, name, None)
            if isinstance(config, Mapping) and "input_size" in config:
                size = config["input_size"]
    if size is None:
        raise UserError(
            f"example_input is needed for {type(model).__name__}, for instance "
            "torch.zeros(1, 3, 224, 224)"
        )
    parameter = next(model.parameters(), torch.empty(0))
    return (torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype),)


def attempt(action: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    """The result of an action that runs the model on `arguments`.

    Raises:
        UserError: the model does not take them.
    """
    try:
        return action()
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in arguments]
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the model does not take example_input of shape {', '.join(map(str, shapes))}: "
            f"{reason[0]}"
        ) from error
