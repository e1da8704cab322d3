"""Feature maps of a network, as a backbone for detection and segmentation."""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from torch import Tensor, nn

from senet.errors import UserError
from senet.models import Network, Stage
from senet.models.residual import (
    BasicBlock,
    Bottleneck,
    PreActivationBlock,
    ResidualBlock,
)
from senet.models.resnet import ResNet
from senet.nn.padded_shortcut import PaddedShortcut
from senet.support.shapes import Float


class Backbone(nn.Module):
    """The stem and stages of a network; its parameters and their names are the network's own.

    Args:
        model: the network; its layers are shared, not copied. Classifier and stages behind the
            last wanted one are left out. A child that is replaced here is replaced for the
            backbone alone.
        out_stages: numbers of the stages to give out, in ascending order; None for all.
        frozen_bn: keep batch norms as they are: running statistics in training too, weights
            without gradients. For batches of few large images on a trained network.

    Attributes:
        out_stages: numbers of the stages.
        channels: channels of each map.
        strides: pixels of the image from one position of each map to the next.

    Raises:
        UserError: a stage the network does not have, none, or not in ascending order.
    """

    def __init__(
        self, model: Network, out_stages: Sequence[int] | None = None, *, frozen_bn: bool = False
    ) -> None:
        super().__init__()
        stages = tuple(model.stages) if out_stages is None else tuple(out_stages)
        if (
            not stages
            or list(stages) != sorted(set(stages))
            or not set(stages) <= set(model.stages)
        ):
            raise UserError(
                f"out_stages must be ascending numbers out of {tuple(model.stages)}, got "
                f"{out_stages}"
            )
        self.out_stages = stages
        self.channels = tuple(model.stages[stage].channels for stage in stages)
        self.strides = tuple(model.stages[stage].stride for stage in stages)
        self.frozen_bn = frozen_bn
        self._stages = tuple(stage for stage in model.stages if stage <= stages[-1])
        later = {
            child.split(".")[0]
            for number, stage in model.stages.items()
            if number > stages[-1]
            for child in stage.children
        }
        kept = {c.split(".")[0] for n in self._stages for c in model.stages[n].children}
        unused = (later - kept) | {model.head.split(".")[0], "avgpool", "dropout", "AuxLogits"}
        if later:
            unused.add("norm")  # behind the last stage of pre-activation networks
        for name, child in model.named_children():
            if name not in unused:
                self.add_module(name, child)
        # In a tuple, so that the whole network does not become a child: its needed children do.
        self._network = (_with_children(model, self._modules),)
        if frozen_bn:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train(model.training)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> Self:
        """Training mode, but not for frozen batch norms."""
        super().train(mode)
        if self.frozen_bn:
            for norm in self._norms():
                norm.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the network, see `Network.set_grad_checkpointing`."""
        self._network[0].set_grad_checkpointing(enable)

    def _running(self) -> Network:
        """The network, with the very children that the backbone has."""
        (network,) = self._network
        # A replica of nn.DataParallel has a dictionary of its own, and layers on another device.
        same = network._modules is self._modules
        return network if same else _with_children(network, self._modules)

    def maps(self, x: Float[Tensor, "n c h w"]) -> Iterator[tuple[int, Tensor]]:
        """The wanted stages' numbers and maps of images x, in order."""
        network = self._running()
        x = network.forward_stem(x)
        for stage in self._stages:
            x = network.forward_stage(stage, x)
            if stage in self.out_stages:
                yield stage, x


def _with_children(model: Network, children: dict[str, nn.Module | None]) -> Network:
    """The network with other children; the dictionary itself, so that replaced ones run."""
    network = copy.copy(model)
    network._modules = children
    # Left-out ones are looked at still (whether there is a `norm` behind the last stage).
    others = {name: child for name, child in model._modules.items() if name not in children}
    network.__dict__.update(others)
    return network


class FeatureMaps(Backbone):
    """A backbone that gives its maps by name; arguments, attributes and errors as of `Backbone`."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        """The maps (N, channels, H/stride, W/stride) by name, `stage2` ….

        Args:
            x: images (N, in_channels, H, W), prepared as for the network.
        """
        return {f"stage{stage}": y for stage, y in self.maps(x)}


class FeatureInfo(NamedTuple):
    """What timm's backbones say of their maps.

    Attributes:
        out_indices: numbers of the maps, a stage's number less 1.
        all_channels: channels of each map.
        all_strides: pixels of the image from one position of each map to the next.
    """

    out_indices: tuple[int, ...]
    all_channels: tuple[int, ...]
    all_strides: tuple[int, ...]

    def channels(self) -> list[int]:
        """Channels of each map."""
        return list(self.all_channels)

    def reduction(self) -> list[int]:
        """Stride of each map."""
        return list(self.all_strides)


class FeatureList(Backbone):
    """A backbone that gives its maps as a list, as timm's `features_only=True` does."""

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and strides of the maps."""
        indices = tuple(stage - 1 for stage in self.out_stages)
        return FeatureInfo(indices, self.channels, self.strides)

    def forward(self, x: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """The maps (N, channels, H/stride, W/stride) of images x, in the order of the stages."""
        return [y for _, y in self.maps(x)]


def feature_list(
    model: Network, out_indices: Sequence[int] | int | None = None, *, frozen_bn: bool = False
) -> FeatureList:
    """Feature maps of a network as timm gives and counts them.

    Args:
        model: as of `Backbone`.
        out_indices: numbers of the maps: i is that of stage i + 1, which in ImageNet networks has
            stride 2**(i + 1) as in timm (whose VGG alone counts from the image itself, and gives
            maps before their pooling); or how many of the last ones. None for all.
        frozen_bn: as of `Backbone`.

    Raises:
        UserError: a number that the network does not have, none, or not in ascending order.
    """
    stages = tuple(model.stages)
    wanted: Sequence[int] | None = None
    if isinstance(out_indices, int):
        wanted = stages[-out_indices:] if 0 < out_indices <= len(stages) else ()
    elif out_indices is not None:
        wanted = [index + 1 if index >= 0 else stages[index] for index in out_indices]
    if wanted is not None and (
        not wanted or list(wanted) != sorted(set(wanted)) or not set(wanted) <= set(stages)
    ):
        raise UserError(
            f"out_indices must be ascending numbers out of {tuple(s - 1 for s in stages)}, or how "
            f"many of the last maps, got {out_indices}"
        )
    return FeatureList(model, wanted, frozen_bn=frozen_bn)


def features(
    model: Network, out_stages: Sequence[int] | None = None, *, frozen_bn: bool = False
) -> FeatureMaps:
    """Feature maps of a network; arguments and errors as of `Backbone`.

    ImageNet networks number their stages by stride, stage k has stride 2**k (the paper's
    numbering of ResNets): `features(create_model("se_resnet50"), out_stages=(2, 3, 4, 5))`.
    """
    return FeatureMaps(model, out_stages, frozen_bn=frozen_bn)


def dilate(model: Network, output_stride: int) -> None:
    """Let the last stages keep the map's size, with dilated convolutions in place of strides.

    Each position of the smaller map has the very value it had; those in between are new. For
    inputs whose size is a multiple of the former stride (plus one) the former map is every second
    (fourth …) position of the new one.

    Args:
        model: a residual network, changed in place; its parameters stay.
        output_stride: stride of the last stage from then on: 8 or 16 for ImageNet networks.

    Raises:
        UserError: not a residual network, or a stride that none of its stages has.
    """
    if not isinstance(model, ResNet):
        raise UserError(f"only residual networks can be dilated, not {model.config['name']}")
    strides = [stage.stride for stage in model.stages.values()]
    if output_stride not in strides:
        raise UserError(f"output_stride must be one of {strides}, got {output_stride}")
    rate = 1
    for number, stage in model.stages.items():
        if stage.stride <= output_stride:
            continue
        before, rate = rate, stage.stride // output_stride
        for block in getattr(model, stage.children[0]):
            assert isinstance(block, ResidualBlock)
            _dilate_block(block, before, rate)
            before = rate
        model.stages[number] = Stage(stage.children, stage.channels, output_stride)


def _dilate_block(block: ResidualBlock, before: int, after: int) -> None:
    """Dilate by `before` up to the layer that strides, by `after` behind it."""
    if isinstance(block, Bottleneck):
        block.stride = 1  # or a later change of the variant would bring the stride back
    assert isinstance(block, BasicBlock | Bottleneck | PreActivationBlock)
    rate = before
    for name in ("conv1", "conv2", "conv3"):
        layer = getattr(block, name, None)
        if isinstance(layer, nn.Conv2d):
            strided = layer.stride != (1, 1)
            _dilate_conv(layer, rate)
            rate = after if strided else rate
    shortcut = block.downsample
    if isinstance(shortcut, PaddedShortcut):
        shortcut.stride = 1
    elif shortcut is not None:
        for layer in shortcut.modules():
            if isinstance(layer, nn.Conv2d):
                _dilate_conv(layer, before)


def _dilate_conv(layer: nn.Conv2d, rate: int) -> None:
    layer.stride = (1, 1)
    if layer.kernel_size != (1, 1):
        layer.dilation = layer.padding = (rate, rate)
