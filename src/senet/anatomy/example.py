"""What a model is called with where nobody says it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.errors import UserError

_SIDES = {1: (256,), 2: (64, 224, 32), 3: (32, 64)}  # tried in this order, by spatial dimensions
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def example_arguments(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """What the model is called with: the example, or zeros of the model's own input size.

    Raises:
        UserError: there is no example, and the model says no size.
    """
    if isinstance(example, tuple):
        return example
    if example is not None:
        return (example,)
    shape = _own_shape(model)
    if shape is None:
        raise UserError(
            f"example_input is needed for {type(model).__name__}, for instance "
            "torch.zeros(1, 3, 224, 224)"
        )
    return (zeros_for(model, shape),)


def guessed_arguments(model: nn.Module, example: Any) -> list[tuple[Any, ...]]:
    """As `example_arguments`, but with the first convolution's channels where there is no size.

    Returns:
        What to call the model with; where the size is guessed, several to be tried in this order.

    Raises:
        UserError: there is no example, the model says no size and begins with no convolution.
    """
    first = _first_convolution(model)
    if example is not None or _own_shape(model) is not None or first is None:
        return [example_arguments(model, example)]
    sides = _SIDES[len(first.kernel_size)]
    return [(zeros_for(model, (1, *_size(first, side))),) for side in sides]


def zeros_for(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Zeros like the model's first parameter; quantized layers have none: float32 on the CPU."""
    parameter = next(model.parameters(), torch.empty(0))
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)


def own_size(model: nn.Module) -> tuple[int, ...] | None:
    """The size (C,*) of an input by `model.input_size`; None where that says nothing.

    One number is the side of square images (of a cube, of a row), with the channels of the first
    convolution.
    """
    size: Any = getattr(model, "input_size", None)
    if isinstance(size, int):
        first = _first_convolution(model)
        return (3, size, size) if first is None else _size(first, size)
    try:
        return None if size is None or isinstance(size, str) else tuple(int(n) for n in size)
    except (TypeError, ValueError):  # a layer or a function of that name
        return None


def _first_convolution(model: nn.Module) -> _Convolution | None:
    return next((m for m in model.modules() if isinstance(m, _CONVOLUTIONS)), None)


def _size(first: _Convolution, side: int) -> tuple[int, ...]:
    """(C,*) of an input that the first convolution takes."""
    return (first.in_channels, *(side,) * len(first.kernel_size))


def _own_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape (1,C,*) that a model says it takes."""
    size = own_size(model)
    if size is not None:
        return (1, *size)
    for name in ("pretrained_cfg", "default_cfg"):  # timm
        config = getattr(model, name, None)
        if isinstance(config, Mapping) and "input_size" in config:
            return (1, *config["input_size"])
    channels = getattr(getattr(model, "config", None), "num_channels", None)  # Hugging Face
    if isinstance(channels, int):
        side = getattr(model.config, "image_size", 224)
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        return (1, channels, *sides)
    if isinstance(model, fx.GraphModule):
        inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
        value = inputs[0].meta.get("val") if len(inputs) == 1 else None
        if isinstance(value, Tensor):  # of an exported program
            return tuple(int(size) for size in value.shape)
    return None


def attempt(action: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    """The result of an action that runs the model on `arguments`.

    Raises:
        UserError: the model does not take them.
    """
    try:
        return action()
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in arguments]
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the model does not take example_input of shape {', '.join(map(str, shapes))}: "
            f"{reason[0]}"
        ) from error
