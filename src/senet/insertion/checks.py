"""What `insert` refuses, before it changes anything."""

from collections.abc import Sequence

import torch
from torch import nn
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
