"""What every network of this package has in common, and how one is made by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import UserError
from senet.models.elsewhere import split_tag
from senet.models.hub import HubMixin, plain_values
from senet.models.options import SE_OPTIONS, SEOptions
from senet.models.registry import entry
from senet.nn.block import NotScriptable, hooked
from senet.nn.recomputation import recomputed_backward
from senet.support.shapes import Float

# What timm's models are told, in our words.
_ELSEWHERE = {
    "in_chans": "in_channels",
    "drop_rate": "dropout, which some networks have (senet154, inception_v3, vgg16_bn, …)",
    "features_only": "senet.create_model(…, features_only=True) or senet.features(model)",
    "out_indices": "senet.create_model(…, features_only=True, out_indices=…)",
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
        num_classes: classes of the head; 0 for none.
        grad_checkpointing: whether blocks are computed again in the backward pass, see
            `set_grad_checkpointing`.
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
    grad_checkpointing: bool = False

    @property
    def num_classes(self) -> int:
        return int(self.config["num_classes"])

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
            child = getattr(self, name)
            for block in _blocks(child) if self.grad_checkpointing else (child,):
                x = self.through(block, x, block)
        return x

    def through(self, step: Callable[[Tensor], Tensor], x: Tensor, within: nn.Module) -> Tensor:
        """step(x), whose inner maps are not kept under gradient checkpointing.

        Args:
            step: a function of x alone.
            x: its input.
            within: the module whose batch norms it runs.
        """
        if self.grad_checkpointing and torch.is_grad_enabled():
            return recomputed_backward(step, x, within)
        return step(x)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f a b"]:
        """The last feature map (N, num_features, h, w) of images x (N, in_channels, H, W)."""
        x = self.forward_stem(x)
        for stage in self.stages:
            x = self.forward_stage(stage, x)
        return x

    @abstractmethod
    def forward_head(
        self, x: Float[Tensor, "n f a b"], pre_logits: bool = False
    ) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of a last feature map; (N, num_features) for num_classes=0.

        With `pre_logits` what the last linear layer gets: (N, num_features), of VGG (N, 4096).
        """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits (N, num_classes) of images x (N, in_channels, H, W); no softmax.

        With num_classes=0 the pooled features (N, num_features).
        """
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer; for num_classes=0 the nn.Identity in its place."""
        return self.get_submodule(self.head if self.num_classes else self.head.split(".")[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the network a fresh last layer, on the device and in the dtype of the others.

        The network is then as if it had been made with that many classes: `config` says so, and
        `classes` and `metrics` are forgotten. Make the optimizer afterwards.

        Args:
            num_classes: classes; 0 for no classifier (the network returns pooled features; of VGG
                the two layers of 4096 go too).
            global_pool: None or "avg": these networks pool by the mean.

        Raises:
            UserError: a negative number, or another pooling.
        """
        if num_classes < 0:
            raise UserError(f"num_classes must be at least 0, got {num_classes}")
        if global_pool not in (None, "avg"):
            raise UserError(
                f'global_pool must be None or "avg", got {global_pool!r}: these networks pool by '
                "the mean; model.forward_features(x) gives the map before it"
            )
        former = set(self.modules())
        like = list(self.parameters())[-1]  # the former one's, or what stands last without it
        self.make_classifier(num_classes)
        for module in set(self.modules()) - former:
            module.to(like.device, like.dtype).train(self.training)
        self.config = {**self.config, "num_classes": num_classes}
        self.classes = self.metrics = None

    def make_classifier(self, num_classes: int) -> None:
        """Put freshly initialised last layers in place, for `reset_classifier`."""
        last = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.head, last)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no maps within blocks for the backward pass, but compute them again there.

        Training takes less memory and a second forward pass of the blocks; gradients, running
        statistics and random numbers are the same, eagerly and under torch.compile (whose compiler
        decides there what it keeps). Stem and head are not part of it, nor passes without
        gradients.
        """
        self.grad_checkpointing = enable


def _blocks(child: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a stage's child; the child itself where hooks on it want to be called."""
    if type(child) is nn.Sequential and not hooked(child):
        yield from child
    else:
        yield child


def build_model(
    name: str, *, num_classes: int = 1000, in_channels: int = 3, **options: Any
) -> Network:
    """A freshly initialised network.

    Args:
        name: one of `list_models()`, or timm's name of one (`seresnet50`, `legacy_senet154`), whose
            options count then unless they are given.
        num_classes: classes of the head; 0 for none (the network returns pooled features).
        in_channels: channels of the images.
        **options: of SE networks reduction, squeeze, gate, integration, stages (`SEOptions`);
            of some networks their own, such as `variant` or `dropout`.

    Raises:
        UserError: unknown name, an option the network does not have, or a value out of range.
    """
    asked = split_tag(name)
    if asked.tag is not None:
        raise UserError(
            f"{name} names weights too, which nothing was told to take: give pretrained=True "
            f"(senet train: --init pretrained), or leave out .{asked.tag}"
        )
    found = entry(asked.name)
    name, options = found.name, {**asked.options, **options}
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
