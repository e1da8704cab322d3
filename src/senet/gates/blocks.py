"""What is left of an SE block whose gates, or some of them, became constants."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.anatomy import Excitation
from senet.anatomy.graph import Node, argument
from senet.gates.inline import Product, replace_product
from senet.insertion.replace import replace_block
from senet.nn.block import GATES, GlobalSqueeze, weight_dtype
from senet.support.shapes import Float, Int

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}
_LAYERS = ("conv", "linear")


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
        activation: name of the activation, a key of `ACTIVATIONS`.
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
        # Checkpoints of former versions name the class: ReLU, SiLU, Hardswish.
        self.activation = ACTIVATIONS[shape.activation.lower()]()
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


def as_partial(block: Excitation) -> PartialExcitation | None:
    """The block as a `PartialExcitation` that keeps all gates; None where it has another form.

    Compared on random maps with the block itself, so that a look-alike is not mistaken.
    """
    module, channels = block.module, block.channels
    first = block.occurrences[0]
    layers = [node for node in first.program if node.kind in ("conv", "linear")]
    kinds = [step.kind for step in block.program]
    scalar = [step.function.rstrip("_") for step in block.program if step.kind not in _LAYERS]
    if module is None or block.shift or block.squeeze != "avg" or block.gate not in GATES:
        return None
    if [kind in _LAYERS for kind in kinds] != [True, False, True] or scalar[0] not in ACTIVATIONS:
        return None
    (w1, b1), (w2, b2) = (_weights_of(node) for node in layers)
    if w1 is None or w2 is None or w1[0].numel() != channels or w2.shape[0] != channels:
        return None
    shape = PartialShape(
        channels=channels,
        hidden=w1.shape[0],
        kept=channels,
        activation=scalar[0],
        gate=block.gate,
        bias=b1 is not None and b2 is not None,
    )
    made = PartialExcitation(shape).to(w1.device, w1.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for mine, weight, bias in ((made.fc1, w1, b1), (made.fc2, w2, b2)):
            mine.weight.copy_(weight.flatten(1))
            if shape.bias and bias is not None:
                mine.bias.copy_(bias)
        x = torch.randn(2, channels, *(3,) * len(block.places)).to(w1)
        alike = torch.allclose(made(x), copy.deepcopy(module).eval()(x), rtol=1e-4, atol=1e-5)
    return made if alike else None


def _weights_of(node: Node) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    return tuple(n.tensor if isinstance(n, Node) else None for n in (weight, bias))  # type: ignore[return-value]


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


def restructure(model: nn.Module, folded: dict[str, dict[str, Any]]) -> nn.Module:
    """Give a fresh model the structure of a folded one, so that it can load its weights.

    Args:
        model: as it was before `fold_gates`; changed in place.
        folded: `FoldReport.structure`.

    Returns:
        The model; another object where blocks were folded in its own code.
    """
    for name, about in folded.items():
        if about["kind"] == "inline":
            shape = about["scale"]
            scale = None if shape is None else torch.ones(shape)
            model = replace_product(model, Product(**about["product"]), scale)
        elif about["kind"] == "removed":
            replace_block(model, name, None)
        elif about["kind"] == "constant":
            replace_block(model, name, ConstantScale(about["channels"]))
        else:
            replace_block(model, name, PartialExcitation(PartialShape(**about["shape"])))
    return model
