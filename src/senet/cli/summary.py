"""`senet summary`: layers of a network or of one SE block."""

from typing import Annotated

from cyclopts import Parameter

from senet.cli.options import (
    NO_NETWORK,
    NO_SE,
    NetworkFlags,
    OptionalWhole,
    SEFlags,
    WholeNumbers,
    given,
    named,
)
from senet.support.text import print_table


def summary(
    name: str,
    /,
    *,
    input_shape: Annotated[WholeNumbers, Parameter(name="--input")] = None,
    num_classes: OptionalWhole = None,
    channels: OptionalWhole = None,
    se: SEFlags = NO_SE,
    network: NetworkFlags = NO_NETWORK,
) -> None:
    """Show layers, output shapes, parameters and multiply-adds of a network, or of an SE block.

    Below the layers of a network: the same by stage, and what SE adds to each.

    Args:
        name: a network (`senet models` lists them), or 'block' for one SE block.
        input_shape: channels, height and width of the input (default: the network's own).
        num_classes: classes of the network (default: 1000, 10 for CIFAR networks).
        channels: channels of the block; only with 'block'.
    """
    from senet.commands.summary import print_network, summary_of_block

    options = given(se) | given(network)
    if name == "block":
        options |= named(num_classes=num_classes)
        print_table(summary_of_block(channels, input_shape, options))
    else:
        options |= named(channels=channels)
        print_network(name, input_shape, num_classes, options)
