"""Telling SE blocks from other modules: ours, torchvision's, timm's and look-alikes."""

import re

from torch import nn

from senet.nn.block import SqueezeExcitation

# SEModule, SELayer, SEBlock, EffectiveSEModule, LegacySEModule, SqueezeExcite, SqueezeExcitation,
# SqueezeAndExcite, ….
_SE_NAME = re.compile(
    r"^(Effective|Legacy|Channel|My)?_?(SE(Module|Layer|Block|Unit|Attention)?$|Squeeze.{0,5}Excit)"
)
# Gates per channel that are made in another way (efficient channel attention, CBAM, …).
_OTHER_ATTENTION = re.compile(r"^(Ce|E)caModule|Cbam|CBAM|GlobalContext|GatherExcite|CoordAttn")


def is_excitation(module: nn.Module) -> bool:
    """Whether the module is an SE block, by its type or the name of its class."""
    return isinstance(module, SqueezeExcitation) or bool(_SE_NAME.match(type(module).__name__))


def is_channel_attention(module: nn.Module) -> bool:
    """Whether the module is an SE block or gates channels in another known way."""
    return is_excitation(module) or bool(_OTHER_ATTENTION.match(type(module).__name__))


def excitations(model: nn.Module) -> dict[str, nn.Module]:
    """All SE blocks of a model by dotted name, in the model's order; none inside another one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if is_excitation(module) and not inside:
            found[name] = module
    return found
