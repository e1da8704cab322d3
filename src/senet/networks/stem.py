"""The first convolution of a network, for images of another number of channels."""

from typing import Any

import torch
from torch import nn

from senet.errors import UserError
from senet.weights.load import adapt_channels


def adapt_stem(model: nn.Module, channels: int, *, given: int = 3, fresh: bool = False) -> str:
    """Let a network take images of another number of channels, in place.

    The first convolution's weight is summed for one channel, repeated and rescaled for others
    (`senet.weights.load.adapt_channels`, as timm does it), so that maps behind it keep their size.

    Args:
        model: the network; where it has `config` and `input_size`, they are changed too.
        channels: of the images.
        given: channels that it takes.
        fresh: draw the weight anew, as spread out as that of `channels` times as many inputs is,
            for a network that has learned nothing yet; from PyTorch's global generator.

    Returns:
        The name of the convolution.

    Raises:
        UserError: there is no convolution over all of the `given` channels.
    """
    found = next(
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and (module.in_channels, module.groups) == (given, 1)
        ),
        None,
    )
    if found is None:
        raise UserError(
            f"{type(model).__name__} has no convolution over images of {given} channels, which "
            f"could be adapted to {channels}"
        )
    name, module = found
    with torch.no_grad():
        weight = adapt_channels(module.weight, channels)
        if fresh:
            spread = float(module.weight.std()) * (given / channels) ** 0.5
            weight = torch.randn_like(weight) * spread
    module.weight = nn.Parameter(weight, module.weight.requires_grad)
    module.in_channels = channels
    about: Any = model
    if isinstance(getattr(model, "config", None), dict):
        about.config = {**about.config, "in_channels": channels}
    if hasattr(model, "input_size"):
        about.input_size = (channels, *about.input_size[1:])
    return name
