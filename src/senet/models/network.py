"""What every network of this package has in common, and the options of its SE blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from senet.layers import GATES, SQUEEZES, GateName, Squeeze, SqueezeExcitation

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

    Raises:
        ValueError: a value outside these.
    """

    reduction: float = 16
    squeeze: Squeeze = "avg"
    gate: GateName = "sigmoid"
    integration: Integration = "standard"
    stages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reduction, int | float) or not self.reduction > 0:
            raise ValueError(f"reduction must be a positive number, got {self.reduction!r}")
        _choice("squeeze", self.squeeze, SQUEEZES)
        _choice("gate", self.gate, GATES)
        _choice("integration", self.integration, INTEGRATIONS)
        if self.stages is not None:  # lists come from JSON and TOML
            object.__setattr__(self, "stages", tuple(self.stages))

    def check_stages(self, available: tuple[int, ...]) -> None:
        """Raise ValueError unless `stages` is a non-empty set of the `available` ones."""
        stages = available if self.stages is None else self.stages
        if not stages or len(set(stages)) != len(stages) or not set(stages) <= set(available):
            raise ValueError(
                f"stages must be different numbers out of {available}, got {self.stages}"
            )

    def in_stage(self, stage: int) -> bool:
        """Whether blocks of `stage` (numbered as in the paper) get SE."""
        return self.stages is None or stage in self.stages

    def block(self, channels: int) -> SqueezeExcitation:
        """An SE block for `channels` channels."""
        return SqueezeExcitation(channels, self.reduction, squeeze=self.squeeze, gate=self.gate)


class Network(nn.Module, ABC):
    """A classifier: features, global average pooling, one linear layer.

    Attributes:
        config: name, num_classes, in_channels and options that `create_model` made it from.
        input_size: (C,H,W) at which the paper quotes multiply-adds.
        min_input_size: smallest height and width the network takes.
        num_features: channels of the last feature map.
    """

    config: dict[str, Any]
    input_size: tuple[int, int, int]
    min_input_size: int
    num_features: int

    @abstractmethod
    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """The last feature map (N, num_features, h, w) of images x (N, in_channels, H, W)."""

    @abstractmethod
    def forward_head(self, x: Float[Tensor, "n f a b"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of a last feature map; (N, num_features) for num_classes=0."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of images x (N, in_channels, H, W); no softmax.

        With num_classes=0 the pooled features (N, num_features).
        """
        return self.forward_head(self.forward_features(x))
