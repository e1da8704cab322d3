"""What every network of this package has in common, and the options of its SE blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from senet.errors import UserError
from senet.models.hub import HubMixin, plain_values
from senet.nn.block import (
    GATES,
    SQUEEZES,
    GateName,
    Squeeze,
    SqueezeExcitation,
    hidden_width,
    no_script,
)

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
        if not isinstance(self.reduction, int | float) or not self.reduction > 0:
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


def stage_options(se: SEOptions | None, stage: int) -> SEOptions | None:
    """The options for blocks of `stage`: None where the stage gets no SE."""
    return se if se is not None and se.in_stage(stage) else None


@dataclass(frozen=True)
class Stage:
    """A stretch of a network that ends before the map is halved again.

    Attributes:
        children: names of the network's children that make it, in order.
        channels: channels of its output.
        stride: pixels of the image from one position of its output to the next.
    """

    children: tuple[str, ...]
    channels: int
    stride: int


class Network(nn.Module, HubMixin, ABC):
    """A classifier: a stem, stages, global average pooling, one linear layer.

    Attributes:
        config: name, num_classes, in_channels and options that `create_model` made it from.
        input_size: (C,H,W) at which the paper quotes multiply-adds.
        min_input_size: smallest height and width the network takes.
        num_features: channels of the last feature map.
        stages: the stages by number, in order. Those of an ImageNet network are numbered so that
            stage k has stride 2**k, which for ResNets is the paper's numbering (table 1).
        head: name of the last linear layer.
        preprocessing: how an image becomes the input, as plain values (see
            `senet.weights.layouts`); set when weights are loaded whose layout implies it. A
            `senet.data.Preprocessing` may be set too, and becomes its plain values.
        classes: names in the order of the logits, for `save_pretrained`; None if unknown.
        metrics: what the network was measured at, for the model card; None if unknown.
    """

    input_size: tuple[int, int, int]
    min_input_size: int
    num_features: int
    stages: dict[int, Stage]
    head: str = "fc"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "preprocessing":
            object.__setattr__(self, name, plain_values(value))
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Network":
        """A freshly initialised network of a configuration, such as another one's `config`.

        Raises:
            UserError: as for `create_model`, or a network of another class than this.
        """
        from senet.models.registry import build_model  # the registry imports this file

        if changed := config.keys() & {"inserted", "folded"}:
            raise UserError(
                f"{config['name']} was changed after it was made ({', '.join(sorted(changed))}): "
                "senet.checkpoint.files.open_checkpoint opens it"
            )
        options = config["options"]
        shape = {key: config[key] for key in ("num_classes", "in_channels")}
        model = build_model(config["name"], **shape, **options)
        if not isinstance(model, cls):
            raise UserError(f"{config['name']} is a {type(model).__name__}, not a {cls.__name__}")
        return model

    @abstractmethod
    def forward_stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """What the first stage gets of images x (N, in_channels, H, W)."""

    def forward_stage(self, stage: int, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """The output of `stage` for the output x of the stage before."""
        for name in self.stages[stage].children:
            x = getattr(self, name)(x)
        return x

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """The last feature map (N, num_features, h, w) of images x (N, in_channels, H, W)."""
        x = self.forward_stem(x)
        for stage in self.stages:
            x = self.forward_stage(stage, x)
        return x

    @abstractmethod
    def forward_head(self, x: Float[Tensor, "n f a b"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of a last feature map; (N, num_features) for num_classes=0."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for first.

        Raises:
            UserError: always.
        """
        raise UserError(no_script(self))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of images x (N, in_channels, H, W); no softmax.

        With num_classes=0 the pooled features (N, num_features).
        """
        return self.forward_head(self.forward_features(x))


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless `dropout` is in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
