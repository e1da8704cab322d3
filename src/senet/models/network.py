"""What every network of this package has in common, and how one is made by name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from senet.errors import UserError
from senet.models.hub import HubMixin, plain_values
from senet.models.options import SE_OPTIONS, SEOptions
from senet.models.registry import entry
from senet.nn.block import NotScriptable

# What timm's models are told, in our words.
_ELSEWHERE = {
    "in_chans": "in_channels",
    "drop_rate": "dropout, which some networks have (senet154, inception_v3, vgg16_bn, …)",
    "features_only": "senet.features(model), which gives the maps of each stage",
    "drop_path_rate": "the recipe's drop_path (senet train --drop-path)",
    "global_pool": "num_classes=0 for pooled features, senet.features(model) for maps",
    "checkpoint_path": "pretrained=PATH",
    "pretrained_cfg": "pretrained=PATH, in any released layout",
    "output_stride": "senet.segmentation, which dilates a network's last stages",
    "se_ratio": "reduction, the ratio of channels to the hidden width",
    "rd_ratio": "reduction, the ratio of channels to the hidden width",
}


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


class Network(NotScriptable, nn.Module, HubMixin, ABC):
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

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of images x (N, in_channels, H, W); no softmax.

        With num_classes=0 the pooled features (N, num_features).
        """
        return self.forward_head(self.forward_features(x))


def build_model(
    name: str, *, num_classes: int = 1000, in_channels: int = 3, **options: Any
) -> Network:
    """A freshly initialised network.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the head; 0 for none (the network returns pooled features).
        in_channels: channels of the images.
        **options: of SE networks reduction, squeeze, gate, integration, stages (`SEOptions`);
            of some networks their own, such as `variant` or `dropout`.

    Raises:
        UserError: unknown name, an option the network does not have, or a value out of range.
    """
    found = entry(name)
    if num_classes < 0:
        raise UserError(f"num_classes must be at least 0, got {num_classes}")
    if in_channels < 1:
        raise UserError(f"in_channels must be at least 1, got {in_channels}")
    for option in options:
        if option in found.options:
            continue
        if option in SE_OPTIONS:
            raise UserError(
                f"{name} has no SE blocks and so no option {option!r}; use {found.twin}"
            )
        if option in _ELSEWHERE:
            raise UserError(f"{name} has no option {option!r}: here that is {_ELSEWHERE[option]}")
        raise UserError(
            f"{name} has no option {option!r}; its options: {', '.join(found.options) or 'none'}"
        )
    own = {key: value for key, value in options.items() if key not in SE_OPTIONS}
    try:
        se = (
            SEOptions(**{k: v for k, v in options.items() if k in SE_OPTIONS}) if found.se else None
        )
        model = found.builder(num_classes=num_classes, in_channels=in_channels, se=se, **own)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    assert isinstance(model, Network)
    model.config = {
        "name": name,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
    }
    return model
