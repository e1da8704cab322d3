"""Another module, or none, in the place of an SE block, wherever the block stands."""

from typing import Any

from torch import nn

from senet.anatomy.excitations import excitations
from senet.errors import UserError
from senet.models.vgg import ReLUSE
from senet.nn.hooks import replace_scaling


def take_out(model: nn.Module, example_input: Any = None) -> tuple[str, ...]:
    """Take all SE blocks out of a network that was built with them; everything else stays.

    Args:
        model: changed in place.
        example_input: see `senet.anatomy.excitations`.

    Returns:
        The names of the blocks.

    Raises:
        UserError: there is none, or one cannot be taken out: its code is written inside of a larger
            module, or it does not give what it is given.
    """
    blocks = excitations(model, example_input)
    if not blocks:
        raise UserError(f"{type(model).__name__} has no SE blocks to take out")
    for name, block in blocks.items():
        if block.module is None:
            raise UserError(
                f"{type(model).__name__}: the SE block {name} is written inside of a larger module "
                "and cannot be taken out; name a FILE.py:FUNCTION that builds the network without"
            )
        for alias, module in list(model.named_modules(remove_duplicate=False)):
            if module is block.module:
                replace_block(model, alias, None)
    if left := excitations(model, example_input):
        raise UserError(f"{type(model).__name__}: the SE block {next(iter(left))} is in it twice")
    return tuple(blocks)


def replace_block(model: nn.Module, name: str, by: nn.Module | None) -> None:
    """Put another module in the place of an SE block, or take it out.

    Args:
        model: changed in place.
        name: of the SE block, or of what stands in its place.
        by: the other module; None for nothing: the slot in a network of this package becomes
            empty, the hook of an inserted block goes, elsewhere an identity takes the place.
    """
    holder_name, _, child = name.rpartition(".")
    holder = model.get_submodule(holder_name)
    block = getattr(holder, child)
    hooked = [module for module in model.modules() if replace_scaling(module, block, by)]
    if by is not None:
        setattr(holder, child, by.train(block.training))
    elif hooked:
        delattr(holder, child)
    elif isinstance(holder, ReLUSE):
        model.set_submodule(holder_name, nn.ReLU().train(holder.training))
    elif child == "se" and _is_ours(holder):
        delattr(holder, child)
        # Plain attributes again, as in a network that never had a block.
        object.__setattr__(holder, "se", None)
        if hasattr(holder, "integration"):
            object.__setattr__(holder, "integration", None)
    else:
        setattr(holder, child, nn.Identity().train(block.training))


def _is_ours(holder: nn.Module) -> bool:
    """Whether the module does without an SE block where its `se` is None."""
    return any(base.__module__.startswith("senet.models.") for base in type(holder).__mro__)
