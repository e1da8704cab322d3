"""Where a constant factor per channel can go: into layers before or after a place in a trace."""

from collections.abc import Callable

import torch
from torch import Tensor

from senet.anatomy.graph import Node, Trace
from senet.anatomy.layers import layer_of
from senet.anatomy.occurrences import Occurrence
from senet.support.shapes import Float

Edit = Callable[[], None]
"""Changes weights in place; made only where all edits of a factor are possible."""

_PASSED = ("permute", "reshape", "same", "dropout", "average_pool")
_HOMOGENEOUS = ("leaky_relu", "leaky_relu_", "prelu")  # f(k·x) = k·f(x) for k > 0


def edits_before(trace: Trace, block: Occurrence, factor: Float[Tensor, " c"]) -> list[Edit] | None:
    """Edits that multiply the channels of the map that a block scales by `factor`, or None.

    The map must be read by nothing else, for others would see it scaled.

    Args:
        trace: the forward pass.
        block: the SE block in it.
        factor: one number a channel.
    """
    source = block.map
    if source.is_output or not block.inside.issuperset(source.users):
        return None
    return _before(trace, source, factor) if _same_channels(source, factor) else None


def edits_after(trace: Trace, block: Occurrence, factor: Float[Tensor, " c"]) -> list[Edit] | None:
    """Edits of what reads a block's output that multiply its channels by `factor`, or None.

    Convolutions and linear layers take a factor into the weights of their input channels.
    """
    return _after(trace, block.end, factor) if _same_channels(block.end, factor) else None


def _before(trace: Trace, node: Node, factor: Tensor) -> list[Edit] | None:
    edit = _own_weights(trace, node, factor)
    if edit is not None:
        return [edit]
    positive = bool((factor > 0).all())
    passes = node.kind in _PASSED or _scales_by_constants(node)
    passes |= positive and (node.kind in ("relu", "max_pool") or node.name in _HOMOGENEOUS)
    if node.kind == "cat":
        if node.channel_dim is None or any(s.channel_dim is None for s in node.sources):
            return None
        sizes = [source.channels for source in node.sources]
        if sum(sizes) != len(factor) or len(set(node.sources)) < len(sizes):
            return None  # a map that stands there twice cannot have two factors
        parts = list(zip(node.sources, factor.split(sizes), strict=True))
    elif passes or (node.kind == "add" and len(node.sources) == 2):  # a constant is not scaled
        parts = [(source, factor) for source in dict.fromkeys(node.sources)]
    else:
        return None
    edits: list[Edit] = []
    for source, part in parts:
        if not _same_channels(source, part) or len(source.users) != 1 or source.is_output:
            return None
        more = _before(trace, source, part)
        if more is None:
            return None
        edits += more
    return edits or None


def _scales_by_constants(node: Node) -> bool:
    """Whether this is c·x or x/c, not c/x."""
    return len(node.sources) == 1 and (
        node.kind == "mul" or (node.kind == "div" and node.inputs[0].moving)
    )


def _same_channels(node: Node, factor: Tensor) -> bool:
    return node.channel_dim is not None and node.channels == len(factor)


def _own_weights(trace: Trace, node: Node, factor: Tensor) -> Edit | None:
    """The edit of the layer whose output this is: convolution, linear layer or affine norm."""
    layer = layer_of(trace, node)
    if layer is None or not _same_channels(node, factor):
        return None
    weight, bias = layer.weight, layer.bias
    norm = node.kind.startswith("norm")
    if weight.shape[0] != len(factor) or (norm and bias is None):
        return None

    @torch.no_grad()
    def edit() -> None:
        weight.mul_(factor.to(weight).view(-1, *(1,) * (weight.ndim - 1)))
        if bias is not None:
            bias.mul_(factor.to(bias))

    return edit


def _after(trace: Trace, node: Node, factor: Tensor) -> list[Edit] | None:
    if node.is_output or not node.users:
        return None
    positive = bool((factor > 0).all())
    edits: list[Edit] = []
    for user in dict.fromkeys(node.users):
        if user.kind in ("conv", "linear") and user.sources == (node,):
            edit = _input_weights(trace, user, factor)
            more = None if edit is None else [edit]
        elif user.kind == "norm" and user.sources == (node,):
            edit = _input_statistics(trace, user, factor)
            more = None if edit is None else [edit]
        elif (
            len(user.sources) == 1
            and (
                user.kind in _PASSED
                or (positive and (user.kind in ("relu", "max_pool") or user.name in _HOMOGENEOUS))
            )
            and (_same_channels(user, factor) or _flattened(node, user, factor))
        ):
            more = _after(trace, user, factor)
        else:
            return None
        if more is None:
            return None
        edits += more
    return edits


def _flattened(node: Node, user: Node, factor: Tensor) -> bool:
    """Whether a pooled map (N,C,1,1) becomes (N,C)."""
    return user.shape == (node.shape[0], len(factor))


def _input_weights(trace: Trace, node: Node, factor: Tensor) -> Edit | None:
    layer = layer_of(trace, node)
    if layer is None:
        return None
    weight, groups = layer.weight, node.groups
    if weight.ndim < 2 or weight.shape[1] * groups != len(factor):
        return None

    @torch.no_grad()
    def edit() -> None:
        shaped = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
        shaped.mul_(factor.to(weight).view(groups, 1, -1, 1))

    return edit


def _input_statistics(trace: Trace, node: Node, factor: Tensor) -> Edit | None:
    """A batch norm of k·x in evaluation mode is one of x with weight·k and mean/k."""
    layer = layer_of(trace, node)
    if layer is None or layer.mean is None:
        return None
    weight, mean = layer.weight, layer.mean
    if len(factor) != len(weight) or not bool((factor.abs() > 1e-6).all()):
        return None

    @torch.no_grad()
    def edit() -> None:
        weight.mul_(factor.to(weight))
        mean.div_(factor.to(mean))

    return edit
