"""What an insertion did: the places of the SE blocks and what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from senet.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Place:
    """An SE block that was inserted.

    Attributes:
        module: name of the module whose output is scaled; for networks of this package the
            residual block that holds the SE block.
        block: name of the SE block itself.
        kind: "residual", "concat", "conv", "named", or "twin" for networks of this package.
        stage: number of the stage, 2 being the first behind the stem; None where unknown.
        channels: channels of the map.
        hidden: hidden width of the SE block.
        dims: spatial dimensions of the map.
        channels_last: whether the map is (N,*,C) and not (N,C,*).
        calls: how often the block runs in a forward pass.
    """

    module: str
    block: str
    kind: str
    stage: int | None
    channels: int
    hidden: int
    dims: int = 2
    channels_last: bool = False
    calls: int = 1

    @property
    def parameters(self) -> int:
        """Weights and biases added: 2·C·h + C + h."""
        return 2 * self.channels * self.hidden + self.channels + self.hidden

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds added to the forward pass of one image: those of both layers."""
        return 2 * self.channels * self.hidden * self.calls


@dataclass(frozen=True)
class InsertionReport:
    """What `insert` did.

    Attributes:
        places: the SE blocks, in the order of execution.
        skipped: places that were recognised but not usable, with the reason.
        reduction: r of the blocks.
        gate: gate of the blocks.
        identical: whether the model's output on the example input is bit-identical to the one
            before; None where another gate than "identity_sigmoid" was asked for, or where no
            tensors were found in it to be compared (an object of the model's own class).
    """

    places: tuple[Place, ...]
    skipped: tuple[tuple[str, str], ...]
    reduction: float
    gate: str
    identical: bool | None

    @property
    def parameters(self) -> int:
        """Parameters added."""
        return sum(place.parameters for place in self.places)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds added to the forward pass of one image."""
        return sum(place.multiply_adds for place in self.places)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the new parameters in the model's state dict."""
        layers = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        return tuple(f"{place.block}.{layer}" for place in self.places for layer in layers)

    def load_original(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of the model as it was before the insertion.

        Everything but the inserted blocks must match exactly; those keep their weights.

        Raises:
            UserError: a key of the original is missing or unknown; nothing was loaded.
        """
        own = set(model.state_dict()) - set(self.keys)
        different = sorted(own ^ set(state))
        if different:
            known = "missing from" if different[0] in own else "unknown to"
            raise UserError(
                f"state dict does not fit: {different[0]} is {known} "
                f"{'it' if different[0] in own else 'the model'} ({len(different)} keys differ)"
            )
        model.load_state_dict(state, strict=False)

    def summary(self) -> str:
        """One sentence."""
        same = {True: ", output bit-identical", False: ", output changed", None: ""}[self.identical]
        if self.identical is None and self.gate == "identity_sigmoid":
            same = ", output not compared"
        left = f", {len(self.skipped)} places left out" if self.skipped else ""
        return (
            f"{len(self.places)} SE blocks, {self.parameters:,} parameters and "
            f"{self.multiply_adds:,} multiply-adds added{same}{left}"
        )
