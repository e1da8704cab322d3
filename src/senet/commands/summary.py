"""Layers, parameters and multiply-adds: of one SE block, of a network, of all networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchinfo
from torch import Tensor, nn

from senet.anatomy import Description, describe
from senet.anatomy.example import zeros_for
from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.errors import UserError
from senet.models.cost import count_multiply_adds, count_parameters, meta_model
from senet.models.paper import StageCost, stage_costs
from senet.networks.anywhere import is_foreign, open_source
from senet.nn.block import SqueezeExcitation
from senet.nn.hooks import without_remark

TIMED_RUNS = 3


@dataclass(frozen=True)
class LayerRow:
    """A line of a layer table.

    Attributes:
        name: name within the module.
        kind: class of the layer.
        shape: shape of the output; of the layers behind the squeeze without the batch.
        parameters: trainable parameters.
        size: bytes of the output.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    size: int


@dataclass(frozen=True)
class BlockSummary:
    """What an SE block does to one image, layer by layer.

    Attributes:
        block: the block.
        input_shape: (1, C, *spatial).
        rows: squeeze, fc1, activation, fc2, gate, scale.
        parameters: all parameters of the block.
        input_bytes: bytes of the input.
        forward_bytes: bytes of all outputs.
        parameter_bytes: bytes of the parameters.
    """

    block: SqueezeExcitation
    input_shape: tuple[int, ...]
    rows: tuple[LayerRow, ...]
    parameters: int
    input_bytes: int
    forward_bytes: int
    parameter_bytes: int


def summarize_block(block: SqueezeExcitation, spatial: tuple[int, ...]) -> BlockSummary:
    """Record the shapes that one image takes on its way through `block`.

    Args:
        block: an SE block on any device, the meta device included.
        spatial: height and width of the map (or as many sizes as `block.dims`), in positions.

    Raises:
        ValueError: `spatial` has not `block.dims` sizes.
    """
    x = zeros_for(block, (1, block.channels, *spatial))
    rows: list[LayerRow] = []

    def record(name: str, module: nn.Module, output: Tensor) -> None:
        # The fully connected layers of one image give vectors; the batch of 1 says nothing there.
        shape = tuple(output.shape) if name == "squeeze" else tuple(output.shape[1:])
        size = output.numel() * output.element_size()
        rows.append(LayerRow(name, _kind(name, module), shape, count_parameters(module), size))

    hooks = [
        module.register_forward_hook(
            lambda module, _inputs, output, name=name: record(name, module, output)
        )
        for name, module in block.named_children()
    ]
    try:
        with torch.no_grad(), without_remark():
            y = block(x)
    finally:
        for hook in hooks:
            hook.remove()
    rows.append(LayerRow("scale", "x · gate", tuple(y.shape), 0, y.numel() * y.element_size()))
    return BlockSummary(
        block,
        tuple(x.shape),
        tuple(rows),
        count_parameters(block),
        x.numel() * x.element_size(),
        sum(row.size for row in rows),
        sum(p.numel() * p.element_size() for p in block.parameters()),
    )


def _kind(name: str, module: nn.Module) -> str:
    if name == "squeeze":
        return f"pooling: {module.extra_repr()}"
    return type(module).__name__


def summary_of_block(
    channels: int | None, input_shape: tuple[int, ...] | None, options: Mapping[str, Any]
) -> BlockSummary:
    """The layers of an SE block of those options.

    Args:
        channels: C; by default the first number of `input_shape`.
        input_shape: (C,H,W) of the input; (L), (H,W) … cannot be told apart, so C is part of it.
            By default (C, 56, 56).
        options: reduction, squeeze, gate and bias of the block.

    Raises:
        UserError: no channels, channels that differ from the input's, or an option that only a
            whole network has.
    """
    for option in options.keys() - {"reduction", "squeeze", "gate", "bias"}:
        flag = option.replace("_", "-")
        raise UserError(f"--{flag} is an option of networks; a block has none")
    if channels is None and input_shape is None:
        raise UserError("a block needs --channels or --input C,H,W")
    if input_shape is None:
        assert channels is not None
        input_shape = (channels, 56, 56)
    if channels is not None and input_shape[0] != channels:
        raise UserError(f"--channels {channels} does not fit --input {_commas(input_shape)}")
    if not 2 <= len(input_shape) <= 4 or min(input_shape) < 1:
        raise UserError(f"--input must be C,H,W (or C,L or C,D,H,W), got {_commas(input_shape)}")
    with torch.device("meta"):
        block = SqueezeExcitation(input_shape[0], dims=len(input_shape) - 1, **options)
    return summarize_block(block, input_shape[1:])


def _commas(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))


@dataclass(frozen=True)
class NetworkSummary:
    """A network's layers and what they cost.

    Attributes:
        name: of the network.
        shape: (C,H,W) of the image.
        layers: torchinfo's table of the layers.
        stages: what each part costs, and what SE adds to it.
        parameters: all of them.
        multiply_adds: of one image.
    """

    name: str
    shape: tuple[int, ...]
    layers: str
    stages: tuple[StageCost, ...]
    parameters: int
    multiply_adds: int


def _known(
    path: Path,
    input_shape: tuple[int, ...] | None,
    num_classes: int | None,
    options: Mapping[str, Any],
) -> tuple[Checkpoint, tuple[int, ...]]:
    """A checkpoint whose network is shown, and the shape of an image for it, by default its own.

    Raises:
        UserError: an option that it decides itself, or as for `open_checkpoint`.
    """
    if num_classes is not None or options:
        raise UserError(f"{path} knows its own classes and options: leave them out")
    checkpoint = open_checkpoint(path)
    images = checkpoint.preprocessing
    return checkpoint, input_shape or (images.channels, images.image_size, images.image_size)


def summarize_excitations(
    name: str | Path,
    input_shape: tuple[int, ...] | None,
    num_classes: int | None,
    options: Mapping[str, Any],
) -> tuple[Description, ...]:
    """The SE blocks of any network, with fresh weights, and the time that they take on the CPU.

    Args:
        name: as for `senet.networks.anywhere.open_source`; or the path of a checkpoint.
        input_shape: (C,*); the network's own by default.
        num_classes: classes; by default 1000, 10 for CIFAR networks.
        options: options of `senet.create_model`; networks from elsewhere have none.

    Raises:
        UserError: unknown name or option, or an input that the network does not take.
    """
    if name == "block" or "channels" in options:
        raise UserError("--se shows the SE blocks of a network: give its name, no --channels")
    if input_shape is not None and (not input_shape or min(input_shape) < 1):
        raise UserError(f"--input must be C,H,W, got {_commas(input_shape)}")
    if isinstance(name, Path):
        checkpoint, shape = _known(name, input_shape, num_classes, options)
        return describe(checkpoint.model, torch.zeros(1, *shape), runs=TIMED_RUNS)
    if input_shape is not None:
        options = {**options, "in_channels": input_shape[0]}
    count = (10 if name.endswith("_cifar") else 1000) if num_classes is None else num_classes
    model: Any = open_source(name, num_classes=count, **options)
    name, options = model.config["name"], {**options, **model.config["options"]}
    shape = input_shape or model.input_size
    return describe(model, torch.zeros(1, *shape), runs=TIMED_RUNS)


def summarize_network(
    name: str | Path,
    input_shape: tuple[int, ...] | None,
    num_classes: int | None,
    options: Mapping[str, Any],
) -> NetworkSummary:
    """The layers of a network, from torchinfo, its stages, and its sums.

    Args:
        name: one of `senet.list_models()`; or the path of a checkpoint of one.
        input_shape: (C,H,W); the network's own by default.
        num_classes: classes; by default 1000, 10 for CIFAR networks.
        options: options of `senet.create_model`.

    Raises:
        UserError: unknown name or option, or an input that the network does not take.
    """
    if "channels" in options:
        raise UserError("--channels is an option of 'block'; give a network --input C,H,W")
    if input_shape is not None and (len(input_shape) != 3 or min(input_shape) < 1):
        raise UserError(f"--input must be C,H,W, got {_commas(input_shape)}")
    if isinstance(name, Path):
        checkpoint, input_shape = _known(name, input_shape, num_classes, options)
        config = checkpoint.model.config
        changed = next((word for word in ("inserted", "folded") if word in config), None)
        if changed is not None:
            raise UserError(
                f"layers are shown of the networks of `senet models`; of {name}, with SE blocks "
                f"{changed}, --se shows the SE blocks"
            )
        network, num_classes, options = config["name"], config["num_classes"], config["options"]
    else:
        network = name
    if input_shape is not None:
        options = {**options, "in_channels": input_shape[0]}
    if is_foreign(network):
        raise UserError(
            f"layers are shown of the networks of `senet models`; of {network} --se shows SE blocks"
        )
    model = meta_model(network, num_classes=num_classes, **options).eval()
    network, options = model.config["name"], {**options, **model.config["options"]}
    shape = input_shape or model.input_size
    if min(shape[1:]) < model.min_input_size:
        raise UserError(
            f"--input {_commas(shape)} is too small: {network} takes images of at least "
            f"{model.min_input_size} × {model.min_input_size} pixels"
        )
    with without_remark():
        layers = torchinfo.summary(
            model,
            input_size=(1, *shape),
            device="meta",
            depth=4,
            col_names=("output_size", "num_params", "kernel_size"),
            row_settings=("var_names",),
            verbose=0,
        )
    # Only the layers: torchinfo's own sums count elementwise work as multiply-adds.
    lines = str(layers).splitlines()
    rulers = [index for index, line in enumerate(lines) if line.startswith("=")]
    return NetworkSummary(
        network,
        tuple(shape),
        "\n".join(lines[: rulers[2] + 1]),
        stage_costs(network, shape, num_classes=num_classes, **options),
        count_parameters(model),
        count_multiply_adds(model, shape),
    )
