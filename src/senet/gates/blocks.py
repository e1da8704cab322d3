"""What is left of an SE block whose gates, or some of them, became constants."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx, nn

from senet.insertion.replace import replace_block
from senet.nn.block import GATES, GlobalSqueeze, SqueezeExcitation, weight_dtype

ACTIVATIONS = {"ReLU": nn.ReLU, "SiLU": nn.SiLU, "Hardswish": nn.Hardswish}
_GATES_BY_CLASS = {
    "sigmoid": "sigmoid",
    "hardsigmoid": "hard_sigmoid",
    "tanh": "tanh",
    "relu": "relu",
    "identitysigmoid": "identity_sigmoid",
}
_LAYERS = (("fc1", "fc2"), ("conv_reduce", "conv_expand"))
_ACTIVATION_NAMES = ("activation", "act", "act1", "relu")
_GATE_NAMES = ("gate", "scale_activation", "sigmoid")


class ConstantScale(nn.Module):
    """A constant factor per channel, where no layer could take it in.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n c *s"]:
        return x * self.scale.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))


@dataclass(frozen=True)
class PartialShape:
    """What a `PartialExcitation` is made of.

    Attributes:
        channels: C.
        hidden: hidden width.
        kept: channels that still have a gate.
        activation: class name of the activation, a key of `ACTIVATIONS`.
        gate: name of the gate, a key of `senet.nn.block.GATES`.
        bias: whether the layers have biases.
    """

    channels: int
    hidden: int
    kept: int
    activation: str
    gate: str
    bias: bool


@fx.wrap  # one node of a symbolic trace, which does not know the dimensions
def scale_some(x: Tensor, kept: Tensor, gates: Tensor) -> Tensor:
    """x (N,C,*) with its channels `kept` (k) scaled by `gates` (N,k)."""
    scale = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    scale = scale.index_copy(1, kept, gates.to(x.dtype))
    return x * scale.view(*scale.shape, *(1,) * (x.ndim - 2))


class PartialExcitation(nn.Module):
    """An SE block with gates for some channels only; the others pass unchanged.

    Args:
        shape: its sizes and functions.
    """

    def __init__(self, shape: PartialShape) -> None:
        super().__init__()
        self.shape = shape
        self.squeeze = GlobalSqueeze("avg")
        self.fc1 = nn.Linear(shape.channels, shape.hidden, shape.bias)
        self.activation = ACTIVATIONS[shape.activation]()
        self.fc2 = nn.Linear(shape.hidden, shape.kept, shape.bias)
        self.gate = GATES[shape.gate]()
        self.kept: Int[Tensor, " k"]
        self.register_buffer("kept", torch.arange(shape.kept))

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n c *s"]:
        z = self.squeeze(x).flatten(1)
        z = z.to(weight_dtype(self.fc1, z.dtype))
        return scale_some(x, self.kept, self.gate(self.fc2(self.activation(self.fc1(z)))))

    def extra_repr(self) -> str:
        return f"channels={self.shape.channels}, kept={self.shape.kept}"


def as_partial(block: nn.Module, channels: int) -> PartialExcitation | None:
    """The block as a `PartialExcitation` that keeps all gates; None where it has another form.

    Compared on random maps with the block itself, so that a look-alike is not mistaken.
    """
    layers = next(
        (
            (getattr(block, a), getattr(block, b))
            for a, b in _LAYERS
            if hasattr(block, a) and hasattr(block, b)
        ),
        None,
    )
    activation = next((getattr(block, n) for n in _ACTIVATION_NAMES if hasattr(block, n)), None)
    gate = next((getattr(block, n) for n in _GATE_NAMES if hasattr(block, n)), None)
    gate_name = _GATES_BY_CLASS.get(type(gate).__name__.lower())
    if layers is None or gate_name is None or type(activation).__name__ not in ACTIVATIONS:
        return None
    fc1, fc2 = layers
    if not all(isinstance(getattr(layer, "weight", None), Tensor) for layer in layers):
        return None  # quantized, or wrapped
    shape = PartialShape(
        channels=channels,
        hidden=fc1.weight.shape[0],
        kept=channels,
        activation=type(activation).__name__,
        gate=gate_name,
        bias=fc1.bias is not None and fc2.bias is not None,
    )
    if fc1.weight.shape[:2] != (shape.hidden, channels) or fc2.weight.shape[0] != channels:
        return None
    made = PartialExcitation(shape).to(fc1.weight.device, fc1.weight.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for mine, theirs in ((made.fc1, fc1), (made.fc2, fc2)):
            mine.weight.copy_(theirs.weight.flatten(1))
            if shape.bias:
                mine.bias.copy_(theirs.bias)
        dims = block.dims if isinstance(block, SqueezeExcitation) else 2
        x = torch.randn(2, channels, *(3,) * dims).to(fc1.weight)
        alike = torch.allclose(made(x), copy.deepcopy(block).eval()(x), rtol=1e-4, atol=1e-5)
    return made if alike else None


def keep_channels(made: PartialExcitation, kept: Int[Tensor, " k"]) -> PartialExcitation:
    """The same with gates for the channels `kept` only."""
    shape = PartialShape(**{**vars(made.shape), "kept": len(kept)})
    smaller = PartialExcitation(shape).to(made.fc1.weight.device, made.fc1.weight.dtype)
    with torch.no_grad():
        smaller.kept.copy_(kept)
        smaller.fc1.load_state_dict(made.fc1.state_dict())
        smaller.activation = made.activation
        smaller.fc2.weight.copy_(made.fc2.weight[kept])
        if made.shape.bias:
            smaller.fc2.bias.copy_(made.fc2.bias[kept])
    return smaller


def restructure(model: nn.Module, folded: dict[str, dict[str, Any]]) -> None:
    """Give a fresh model the structure of a folded one, so that it can load its weights.

    Args:
        model: as it was before `fold_gates`; changed in place.
        folded: `FoldReport.structure`.
    """
    for name, about in folded.items():
        if about["kind"] == "removed":
            replace_block(model, name, None)
        elif about["kind"] == "constant":
            replace_block(model, name, ConstantScale(about["channels"]))
        else:
            replace_block(model, name, PartialExcitation(PartialShape(**about["shape"])))
