"""The options that networks have in common: their SE blocks, and dropout."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from senet.nn.block import GATES, SQUEEZES, GateName, Squeeze, SqueezeExcitation, hidden_width

Integration = Literal["standard", "pre", "post", "identity", "3x3"]
INTEGRATIONS: tuple[str, ...] = get_args(Integration)


def _choice(option: str, value: object, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SEOptions:
    """How SE blocks look and where they stand.

    Attributes:
        reduction: r of eq. 3; the hidden width is floor(C / r).
        squeeze: "avg", "max" (table 11) or "none" (table 16).
        gate: gate function by name (table 12), see `SqueezeExcitation`.
        integration: "standard" after the last BN of the residual branch, "pre" before the
            branch, "post" after the addition and its ReLU, "identity" on the shortcut (after its
            projection), "3x3" inside the branch after the 3×3 convolution and its BN (fig. 5,
            tables 14 and 15).
        stages: stages that get SE blocks, numbered as in the paper (table 13: the stage behind
            the stem is 2); None for all.
        bias: whether the fully connected layers have biases; the released models do, those of
            moskomule/senet.pytorch do not.
        divisor: the hidden width is rounded to the nearest multiple of this, at least one of it,
            where it is not 1; timm's `seresnet*` take 8.

    Raises:
        ValueError: a value outside these.
    """

    reduction: float = 16
    squeeze: Squeeze = "avg"
    gate: GateName = "sigmoid"
    integration: Integration = "standard"
    stages: tuple[int, ...] | None = None
    bias: bool = True
    divisor: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.reduction, int | float) or not 0 < self.reduction < math.inf:
            raise ValueError(f"reduction must be a positive number, got {self.reduction!r}")
        _choice("squeeze", self.squeeze, SQUEEZES)
        _choice("gate", self.gate, GATES)
        _choice("integration", self.integration, INTEGRATIONS)
        if self.bias not in (True, False):
            raise ValueError(f"bias must be true or false, got {self.bias!r}")
        if not isinstance(self.divisor, int) or self.divisor < 1:
            raise ValueError(f"divisor must be a positive whole number, got {self.divisor!r}")
        if self.stages is not None:  # lists come from JSON and TOML
            object.__setattr__(self, "stages", tuple(self.stages))

    def check_stages(self, available: tuple[int, ...]) -> None:
        """Raise ValueError unless `stages` is a non-empty set of the `available` ones."""
        stages = available if self.stages is None else self.stages
        if not stages or len(set(stages)) != len(stages) or not set(stages) <= set(available):
            raise ValueError(
                f"stages must be different numbers out of {available}, got {self.stages}"
            )

    def check_integration(self, *available: Integration) -> None:
        """Raise ValueError unless the network offers this `integration`."""
        if self.integration not in available:
            raise ValueError(
                f"integration must be {' or '.join(available)} in this network, got "
                f"{self.integration!r}"
            )

    def in_stage(self, stage: int) -> bool:
        """Whether blocks of `stage` (numbered as in the paper) get SE."""
        return self.stages is None or stage in self.stages

    def block(self, channels: int) -> SqueezeExcitation:
        """An SE block for `channels` channels."""
        return SqueezeExcitation(
            channels,
            hidden=self.hidden(channels),
            squeeze=self.squeeze,
            gate=self.gate,
            bias=self.bias,
        )

    def hidden(self, channels: int) -> int:
        """Hidden width of a block for `channels` channels."""
        if self.divisor == 1:
            return hidden_width(channels, self.reduction)
        rounded = int(channels / self.reduction + self.divisor / 2) // self.divisor
        return max(1, rounded) * self.divisor


SE_OPTIONS = tuple(field.name for field in fields(SEOptions))


def stage_options(se: SEOptions | None, stage: int) -> SEOptions | None:
    """The options for blocks of `stage`: None where the stage gets no SE."""
    return se if se is not None and se.in_stage(stage) else None


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless `dropout` is in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
