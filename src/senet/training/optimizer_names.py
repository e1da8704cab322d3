"""Optimizers by name: PyTorch's, and timm's where it is installed."""

import difflib
import importlib
import importlib.util
import inspect
from functools import cache
from typing import Any

from senet.errors import UserError

# Those of torch.optim that have a momentum, and take what a recipe says; a table, so that recipes
# are checked without loading PyTorch.
_ADAM = frozenset({"lr", "betas", "weight_decay"})
_PYTORCH = {
    "sgd": ("SGD", frozenset({"lr", "momentum", "nesterov", "weight_decay"})),
    "adamw": ("AdamW", _ADAM),
    "adam": ("Adam", _ADAM),
    "nadam": ("NAdam", _ADAM),
    "radam": ("RAdam", _ADAM),
    "adamax": ("Adamax", _ADAM),
    "rmsprop": ("RMSprop", frozenset({"lr", "momentum", "weight_decay"})),
}


def arguments_of(name: str) -> frozenset[str]:
    """Which of lr, betas, momentum, nesterov and weight_decay an optimizer takes.

    Raises:
        UserError: nobody knows the name, or it needs something else than a recipe says.
    """
    if not isinstance(name, str):  # of a file of flags
        raise UserError(f"optimizer must be a name such as sgd, got {name!r}")
    if name in _PYTORCH:
        return _PYTORCH[name][1]
    parameters = inspect.signature(_of_timm(name)).parameters
    taken = {"lr", "betas", "momentum", "nesterov", "weight_decay"} & parameters.keys()
    if "betas" in taken and len(parameters["betas"].default or ()) != 2:
        taken.remove("betas")
    if not {"lr", "weight_decay"} <= taken or not {"betas", "momentum"} & taken:
        raise UserError(
            f"optimizer {name!r} does not take a learning rate, a momentum and a weight decay: "
            f"choose from {', '.join(_PYTORCH)}, or lamb, lion, … of timm"
        )
    return frozenset(taken)


def optimizer_class(name: str) -> Any:
    """The class of an optimizer, or a function that makes one.

    Raises:
        UserError: nobody knows the name.
    """
    if name in _PYTORCH:
        return getattr(importlib.import_module("torch.optim"), _PYTORCH[name][0])
    return _of_timm(name)


@cache
def _of_timm(name: str) -> Any:
    known: list[str] = []
    if importlib.util.find_spec("timm") is not None:
        optimizers: Any = importlib.import_module("timm.optim")
        # Those of bitsandbytes and Apex need more than timm.
        known = optimizers.list_optimizers(exclude_filters=["bnb*", "fused*"])
        if name in known:
            if optimizers.get_optimizer_info(name).second_order:
                raise UserError(
                    f"optimizer {name} needs second derivatives, which a training step does not "
                    f"compute: choose from {', '.join(_PYTORCH)}, or lamb, lion, … of timm"
                )
            return optimizers.get_optimizer_class(name)
    close = difflib.get_close_matches(name, [*_PYTORCH, *known], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(_PYTORCH)}"
    more = "" if known else " (lamb, lion and others: pip install timm)"
    raise UserError(f"unknown optimizer {name!r}; {hint}{more}")
