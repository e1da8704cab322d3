"""Copies of a user's model, which may hold what cannot be copied."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from senet.errors import UserError

_Model = TypeVar("_Model", bound=nn.Module)


def copied(model: _Model) -> _Model:
    """A copy of a model, sharing nothing with it.

    Raises:
        UserError: something that one of its modules holds cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # what each object in it raises
        found = _culprit(model)
        if found is None:
            raise
        raise UserError(f"{type(model).__name__} cannot be copied: {found}") from error


def _culprit(model: nn.Module) -> str | None:
    """What in a model cannot be copied, and what to do about it."""
    for path, module in model.named_modules():
        held = {key: value for key, value in vars(module).items() if key != "_modules"}
        where = f"{path} ({type(module).__name__})" if path else f"the {type(module).__name__}"
        for key, value in (held | module._buffers).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return f"{where} holds {key} as a result of autograd; {_remedy(module, key)}"
        for key, value in held.items():
            try:
                copy.deepcopy(value)
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                return f"{where} holds {key}, a {type(value).__name__} ({reason[0]}); take it out"
    return None


def _remedy(module: nn.Module, key: str) -> str:
    """How the result of autograd that a module holds becomes a plain tensor.

    PyTorch's older reparametrizations keep one; the hooks before the forward say which it was.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == key:
            return (
                f"call torch.nn.utils.remove_weight_norm(module, {key!r}) first, or use "
                "torch.nn.utils.parametrizations.weight_norm"
            )
        if isinstance(hook, SpectralNorm) and hook.name == key:
            return (
                f"call torch.nn.utils.remove_spectral_norm(module, {key!r}) first, or use "
                "torch.nn.utils.parametrizations.spectral_norm"
            )
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == key:
            return f"call torch.nn.utils.prune.remove(module, {key!r}) first"
    return f"detach it first (module.{key} = module.{key}.detach())"
