"""Steps of a program before they have addresses, what they end with and what they leave."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from senet.inference.buffers import Buffer, Map
from senet.kernels.structs import Activation as Function
from senet.ops.activations import Activation

# Packed weights by what they are packed from and how.
Constants = dict[tuple[object, ...], Tensor]


@dataclass
class NativeStep:
    """A step before its buffers have addresses.

    Attributes:
        fields: numbers of `Step`.
        maps: map or buffer for a pointer of `Step`.
        constants: tensor for a pointer of `Step`.
        strides: of a map that is read as the network's input is, along n, c, h and w.
    """

    fields: dict[str, float]
    maps: dict[str, Map | Buffer]
    constants: dict[str, Tensor] = field(default_factory=dict)
    strides: tuple[int, int, int, int] | None = None


@dataclass
class TorchStep:
    """A node that PyTorch runs.

    Attributes:
        node: the node.
        target: where its result goes for the kernels; None if it stays with PyTorch.
    """

    node: fx.Node
    target: Map | None


@dataclass(frozen=True)
class Sums:
    """What the tasks of a step have summed of its map y.

    Attributes:
        y: the map.
        parts: sums of the parts of its images, (N · blocks, C).
        blocks: parts of an image.
    """

    y: Map
    parts: Map
    blocks: int


@dataclass(frozen=True)
class Ending:
    """What a step ends with.

    Attributes:
        function: the function of each element.
        parameter: its number.
        slopes: of a PReLU, one per channel.
    """

    function: Function = Function.LINEAR
    parameter: float = 0.0
    slopes: Tensor | None = None

    @property
    def fields(self) -> dict[str, float]:
        """As fields of a `Step`."""
        return {"activation": self.function, "parameter": self.parameter}

    @property
    def constants(self) -> dict[str, Tensor]:
        """As constants of a `Step`."""
        return {} if self.slopes is None else {"slopes": self.slopes}


def ending(activation: Activation) -> Ending:
    """An activation as the kernels know it."""
    return Ending(Function[activation.name.upper()], activation.parameter)
