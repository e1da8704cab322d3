"""The activations that the kernels know: a closed set of names, each with at most one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An elementwise function.

    Attributes:
        name: one of `ACTIVATIONS`.
        parameter: the slope left of zero of "leaky_relu", alpha of "elu"; of no other a meaning.
    """

    name: str
    parameter: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """The function of each element of x, in its dtype and shape."""
        return ACTIVATIONS[self.name](x, self.parameter)


ACTIVATIONS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": lambda x, _: F.silu(x),
    "hardswish": lambda x, _: F.hardswish(x),
    "mish": lambda x, _: F.mish(x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x, _: x.sigmoid(),
    "hardsigmoid": lambda x, _: F.hardsigmoid(x),
    "tanh": lambda x, _: x.tanh(),
}
LINEAR, RELU = Activation("linear"), Activation("relu")
