"""Forward hooks: of those who look into networks, and of SE blocks that were inserted."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

# Where a module keeps its hooks of the forward pass.
_FORWARD = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_silent: ContextVar[bool] = ContextVar("silent", default=False)
_said: set[str] = set()


@contextmanager
def without_remark() -> Iterator[None]:
    """Run networks without the remark that the fused operator steps aside, where that is wanted.

    Only the separate modules call hooks, ours among them, and what folding put in an SE block's
    place is another module.
    """
    before = _silent.get()
    _silent.set(True)
    try:
        yield
    finally:
        _silent.set(before)


def say_separate(why_not: str, stacklevel: int) -> None:
    """Warn, once in a process, of modules that run each for itself.

    Args:
        why_not: what the fused operator cannot take.
        stacklevel: of `warnings.warn`, 1 for the caller.
    """
    if torch.compiler.is_compiling() or _silent.get() or why_not in _said:
        return
    _said.add(why_not)
    warnings.warn(
        f"senet runs {why_not} in separate passes, not in its fused operator",
        stacklevel=stacklevel + 1,
    )


def scale_by(module: nn.Module, se: nn.Module, *, channels_last: bool = False) -> None:
    """Let an SE block scale what a module gives from now on.

    The hook holds the block, wherever that is registered: copying and pickling keep both one.

    Args:
        module: gives maps (N,C,…).
        se: takes and gives such maps.
        channels_last: whether the module's are (N,…,C).
    """
    module.register_forward_hook(partial(_scaled, se, channels_last))


def _scaled(
    se: nn.Module, channels_last: bool, module: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    """Forward hook of a module: its output scaled by the SE block."""
    if channels_last:
        return se(output.movedim(-1, 1)).movedim(1, -1)
    return se(output)


def replace_scaling(module: nn.Module, block: nn.Module, by: nn.Module | None) -> bool:
    """Let another block, or none, take the place of one that scales what a module gives.

    Returns:
        Whether it does.
    """
    found = [
        (key, hook)
        for key, hook in module._forward_hooks.items()
        if isinstance(hook, partial) and hook.func is _scaled and hook.args[0] is block
    ]
    for key, hook in found:
        if by is None:
            del module._forward_hooks[key]
        else:
            module._forward_hooks[key] = partial(_scaled, by, *hook.args[1:])
    return bool(found)


def scaling_block(module: nn.Module) -> nn.Module | None:
    """The SE block that scales what a module (N,C,…) gives; None without, or with other hooks."""
    if len(module._forward_hooks) != 1:
        return None
    (hook,) = module._forward_hooks.values()
    if not isinstance(hook, partial) or hook.func is not _scaled:
        return None
    se, channels_last = hook.args
    return None if channels_last else se


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run when a module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def give_forward_hooks(module: nn.Module, to: nn.Module) -> None:
    """Let another module run the hooks that one has, with itself as their module."""
    for name in _FORWARD:
        setattr(to, name, getattr(module, name).copy())


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters and children that calls no hooks."""
    bare = copy.copy(module)
    for name in _FORWARD:
        setattr(bare, name, OrderedDict())
    return bare


def settle_weights(model: nn.Module) -> None:
    """Make parameters of the weights that hooks compute: weight norm, spectral norm, pruning."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
