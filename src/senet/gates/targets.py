"""Where a constant factor per channel can go: into layers before or after a place in a trace."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from senet.anatomy.tracing import Call, Node, Trace

Edit = Callable[[], None]
"""Changes weights in place; made only where all edits of a factor are possible."""

_PASSED = ("permute", "reshape", "same", "dropout", "average_pool")
_HOMOGENEOUS = ("leaky_relu", "leaky_relu_", "prelu")  # f(k·x) = k·f(x) for k > 0


def edits_before(trace: Trace, call: Call, factor: Float[Tensor, " c"]) -> list[Edit] | None:
    """Edits that multiply the channels of what a module call reads by `factor`, or None.

    The map must be read by nothing else, for others would see it scaled.

    Args:
        trace: the forward pass.
        call: of the SE block.
        factor: one number a channel.
    """
    source = call.inputs[0]
    if source.is_output or any(call not in user.calls for user in source.users):
        return None
    return _before(trace, source, factor)


def edits_after(trace: Trace, call: Call, factor: Float[Tensor, " c"]) -> list[Edit] | None:
    """Edits of what reads a module call's output that multiply its channels by `factor`, or None.

    Convolutions and linear layers take a factor into the weights of their input channels.
    """
    return None if call.output is None else _after(trace, call.output, factor)


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


def _module_of(trace: Trace, node: Node) -> nn.Module | None:
    """The layer that computes a node from its own weight and runs only there."""
    if not node.calls:
        return None
    module = node.calls[-1].module
    weight = getattr(module, "weight", None)
    own = isinstance(weight, nn.Parameter) and any(n.tensor is weight for n in node.inputs)
    return module if own and len(trace.calls_of(module)) == 1 else None


def _own_weights(trace: Trace, node: Node, factor: Tensor) -> Edit | None:
    """The edit of the layer whose output this is: convolution, linear layer or affine norm."""
    if node.kind not in ("conv", "linear", "norm", "norm_last"):
        return None
    module = _module_of(trace, node)
    if module is None or not _same_channels(node, factor):
        return None
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    if weight.shape[0] != len(factor) or (node.kind.startswith("norm") and bias is None):
        return None

    @torch.no_grad()
    def edit() -> None:
        weight.mul_(factor.to(weight).view(-1, *(1,) * (weight.ndim - 1)))
        if isinstance(bias, Tensor):
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
    module = _module_of(trace, node)
    if module is None:
        return None
    weight, groups = module.weight, node.groups
    assert isinstance(weight, Tensor)
    if weight.ndim < 2 or weight.shape[1] * groups != len(factor):
        return None

    @torch.no_grad()
    def edit() -> None:
        shaped = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
        shaped.mul_(factor.to(weight).view(groups, 1, -1, 1))

    return edit


def _input_statistics(trace: Trace, node: Node, factor: Tensor) -> Edit | None:
    """A batch norm of k·x in evaluation mode is one of x with weight·k and mean/k."""
    module = _module_of(trace, node)
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
        return None
    if len(factor) != module.num_features or not bool((factor.abs() > 1e-6).all()):
        return None

    @torch.no_grad()
    def edit() -> None:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert module.running_mean is not None
        module.weight.mul_(factor.to(module.weight))
        module.running_mean.div_(factor.to(module.running_mean))

    return edit
