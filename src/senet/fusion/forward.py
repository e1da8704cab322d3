"""A module's forward that runs its tails in the operator, as an attribute of the module.

The module stays what it was: its class, its children, their names, its state. PyTorch calls the
attribute in the place of the class's method; it travels with the module into copies and pickles.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from senet.errors import UserError
from senet.fusion.facts import is_other
from senet.fusion.modules import is_norm
from senet.fusion.rewriting import Plan, Rewritten, rewrite
from senet.fusion.tracing import Ran, Unreadable
from senet.nn.block import hooked, leaves_process
from senet.nn.hooks import say_separate, scaling_block
from senet.ops import choice


class _NoGlobalsError(UserError, AttributeError):
    pass


class FusedForward:
    """Called in the place of a module's own forward, to which it steps aside where it has to.

    It does where a module that it would pass by has hooks or was replaced, where an attribute has
    changed on which the code may depend, under torch.func, and in graphs that leave the process.

    Args:
        owner: the module.
        plan: how to write its forward anew.
        ran: what it did in a run.
    """

    def __init__(self, owner: nn.Module, plan: Plan, ran: Ran | None = None) -> None:
        self.owner, self.plan = owner, plan
        self.rewritten: Rewritten | None = rewrite(owner, plan, ran)

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "plan": self.plan}  # written anew where it is loaded

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, rewritten=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        copy = object.__new__(FusedForward)
        memo[id(self)] = copy
        # The owner is being copied, and this with it.
        copy.owner, copy.plan, copy.rewritten = memo[id(self.owner)], self.plan, self.rewritten
        return copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        given = args or tuple(kwargs.values())
        if len(args) + len(kwargs) == 1 and not leaves_process(x := given[0]):
            rewritten = self.rewritten or self.again()
            named = rewritten is not None and (not kwargs or rewritten.argument in kwargs)
            if rewritten is not None and named and choice.is_worth_it(x):
                if (why := _obstacle(owner, rewritten)) is None:
                    return rewritten.function(owner, x)
                say_separate(why, stacklevel=3)
        return type(owner).forward(owner, *args, **kwargs)

    @property
    def __globals__(self) -> dict[str, Any]:
        """What torch.jit.script asks a forward for first.

        Raises:
            UserError: always; for others, who ask whether there are any, an AttributeError.
        """
        raise _NoGlobalsError(
            f"torch.jit.script cannot compile a fused {type(self.owner).__name__}: undo it with "
            "senet.unfuse(model), or use torch.jit.trace(model.eval(), example_input)"
        )

    @property
    def __code__(self) -> CodeType:
        """That of the class's forward, for torch.export, which names the root's file and line."""
        return type(self.owner).forward.__code__

    def obstacle(self) -> str | None:
        """Why it would step aside now."""
        return None if self.rewritten is None else _obstacle(self.owner, self.rewritten)

    def again(self) -> Rewritten | None:
        """Write the forward anew, of a module that was loaded."""
        del self.owner.__dict__["forward"]  # the module's own is read
        try:
            self.rewritten = rewrite(self.owner, self.plan)
        except Unreadable as why:
            say_separate(f"{type(self.owner).__name__} ({why})", stacklevel=3)
            return None
        finally:
            self.owner.__dict__["forward"] = self
        return self.rewritten


def _obstacle(owner: nn.Module, rewritten: Rewritten) -> str | None:
    """Why the modules have to run each for itself; None where they have not."""
    for path, kind in rewritten.touched:
        module = _found(owner, path)
        if module is None or (type(module) is not kind and not is_norm(module)):
            return f"{type(owner).__name__} with a replaced {'.'.join(path)}"
        if path and (why := hooked(module)) and path not in rewritten.scaled:
            return why
    for path, block in rewritten.scaled.items():
        if why := _hooked_otherwise(_found(owner, path), _found(owner, block)):
            return why
    for path in rewritten.modal:
        part = _found(owner, path)
        if part is None or part.training != owner.training:
            return f"{type(owner).__name__} with parts in another mode"
    if torch.compiler.is_compiling():
        return None
    if nn_module._has_any_global_hook():
        return "modules with global hooks"
    for path, facts in rewritten.facts:
        module = _found(owner, path)
        if module is None or is_other(module, facts):
            return f"{type(module or owner).__name__} with attributes that have changed"
    return None


def _found(owner: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    module: nn.Module | None = owner
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def _hooked_otherwise(module: nn.Module | None, block: nn.Module | None) -> str | None:
    """Which module has hooks beside that of its SE block, or another block; None for none."""
    if module is None or block is None:
        return "modules with a replaced SE block"
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or len(module._forward_hooks) > 1:
        return hooked(module)
    same = scaling_block(module) is block
    return None if same else f"{type(module).__name__} with a replaced SE block"


def fused_forwards(model: nn.Module) -> Iterator[tuple[str, nn.Module, FusedForward]]:
    """Modules with such a forward, by their dotted names."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FusedForward):
            yield name, module, forward
