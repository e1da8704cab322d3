"""Names and shapes of the weights that others released, both ways.

Ours are torchvision's names (timm's for Inception-ResNet-v2) with `se.fc1` and `se.fc2` as linear
layers. A layout says how another one differs, which structure its weights were trained in, and
how its networks want their images.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from senet.errors import UserError
from senet.models import Network
from senet.weights.files import State

_INCEPTION = ("inception_v3", "inception_resnet_v2")


@dataclass(frozen=True)
class Layout:
    """How weights are named and shaped, and what comes with that.

    Attributes:
        name: its name.
        origin: whose it is.
        detect: whether a state dict is in it.
        decode: from its names and shapes to ours.
        encode: and back, for a network; raises UserError where it has no place for something.
        variant: structure of residual networks that it implies; None for any.
        preprocessing: what its networks expect, as plain values; None if it does not say.
    """

    name: str
    origin: str
    detect: Callable[[State], bool]
    decode: Callable[[State, Network], State]
    encode: Callable[[State, Network], State]
    variant: str | None
    preprocessing: Callable[[Network], dict[str, Any] | None]


def preprocessing(
    model: Network,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str = "bilinear",
    resize: int = 256,
    channel_order: str = "rgb",
    value_range: float = 1.0,
) -> dict[str, Any] | None:
    """How images become the input of `model`, as plain values.

    `mean` and `std` (by default ImageNet's) are in units of `value_range` (1 or 255), in
    `channel_order`. For networks of one channel they are averaged. None for networks whose
    channels are not those of pictures, and for CIFAR networks: no layout says how their images
    were prepared.
    """
    # Here, or every network would be made with torchvision and torchdata loaded.
    from senet.data.image_data import IMAGENET_MEAN, IMAGENET_STD

    mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    channels = model.config["in_channels"]
    if channels not in (1, 3) or model.config["name"].endswith("_cifar"):
        return None
    if channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        channel_order = "rgb"  # grey has no order
    return {
        "image_size": model.input_size[1],
        "resize": resize,
        "mean": list(mean),
        "std": list(std),
        "channels": channels,
        "interpolation": interpolation,
        "channel_order": channel_order,
        "value_range": value_range,
    }


def _rename(state: State, *rules: tuple[str, str]) -> State:
    """Apply regular expressions to all names, each in turn."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def linear_gates(state: State) -> State:
    """`se.fc1` and `se.fc2` as linear layers, where they are 1×1 convolutions."""
    return {
        key: tensor.flatten(1) if _is_gate(key) and tensor.ndim == 4 else tensor
        for key, tensor in state.items()
    }


def _convolutional_gates(state: State) -> State:
    return {
        key: tensor[:, :, None, None] if _is_gate(key) else tensor for key, tensor in state.items()
    }


def _is_gate(key: str) -> bool:
    return re.search(r"(^|\.)se\.fc[12]\.weight$", key) is not None


def _same(state: State, model: Network) -> State:
    return dict(state)


def _inception_like(model: Network) -> bool:
    return model.config["name"].removeprefix("se_") in _INCEPTION


def _common_preprocessing(interpolation: str) -> Callable[[Network], dict[str, Any] | None]:
    def of(model: Network) -> dict[str, Any] | None:
        if _inception_like(model):
            half = (0.5, 0.5, 0.5)
            resize = 342 if model.config["name"].endswith("v3") else 333
            return preprocessing(
                model, mean=half, std=half, resize=resize, interpolation=interpolation
            )
        return preprocessing(model, interpolation=interpolation)

    return of


# --- timm --------------------------------------------------------------------------------------

_VGG_TIMM = (
    ("pre_logits.fc1.", "classifier.0."),
    ("pre_logits.fc2.", "classifier.3."),
    ("head.fc.", "classifier.6."),
)


def _from_timm(state: State, model: Network) -> State:
    rules = [(f"^{re.escape(theirs)}", ours) for theirs, ours in _VGG_TIMM]
    renamed = _rename(linear_gates(state), *rules)
    return {  # timm writes VGG's fully connected layers as convolutions
        key: tensor.flatten(1) if key.startswith("classifier.") and tensor.ndim == 4 else tensor
        for key, tensor in renamed.items()
    }


def _to_timm(state: State, model: Network) -> State:
    encoded = {}
    for key, tensor in _convolutional_gates(state).items():
        for theirs, ours in _VGG_TIMM:
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                if key == "pre_logits.fc1.weight":
                    tensor = tensor.view(tensor.shape[0], -1, 7, 7)
                elif key == "pre_logits.fc2.weight":
                    tensor = tensor[:, :, None, None]
        encoded[key] = tensor
    return encoded


# --- Cadene, pretrainedmodels, timm's legacy_se* -----------------------------------------------

# SENet-154's stem: three convolutions, whose last batch norm is our bn1.
_DEEP_STEM = {
    "layer0.conv1": "conv1.0",
    "layer0.bn1": "conv1.1",
    "layer0.conv2": "conv1.3",
    "layer0.bn2": "conv1.4",
    "layer0.conv3": "conv1.6",
    "layer0.bn3": "bn1",
}


def _from_pretrainedmodels(state: State, model: Network) -> State:
    return _rename(state, (r"^last_linear\.", f"{model.head}."))


def _to_pretrainedmodels(state: State, model: Network) -> State:
    renamed = _rename(state, (rf"^{re.escape(model.head)}\.", "last_linear."))
    return _plain_only("pretrainedmodels")(renamed, model)


def _from_legacy(state: State, model: Network) -> State:
    rules = [(r"^last_linear\.", f"{model.head}."), (r"(^|\.)se_module\.", r"\1se.")]
    if "layer0.conv3.weight" in state:
        rules += [(rf"^{re.escape(old)}\.", f"{new}.") for old, new in _DEEP_STEM.items()]
    rules.append((r"^layer0\.", ""))
    return linear_gates(_rename(state, *rules))


def _to_legacy(state: State, model: Network) -> State:
    rules = [(rf"^{re.escape(model.head)}\.", "last_linear."), (r"(^|\.)se\.", r"\1se_module.")]
    if "conv1.6.weight" in state:
        rules += [(rf"^{re.escape(new)}\.", f"{old}.") for old, new in _DEEP_STEM.items()]
    else:
        rules.append((r"^(conv1|bn1)\.", r"layer0.\1."))
    return _rename(_convolutional_gates(state), *rules)


# --- moskomule/senet.pytorch -------------------------------------------------------------------


def _from_moskomule(state: State, model: Network) -> State:
    return _rename(state, (r"\.se\.fc\.0\.", ".se.fc1."), (r"\.se\.fc\.2\.", ".se.fc2."))


def _to_moskomule(state: State, model: Network) -> State:
    biases = {key for key in state if re.search(r"\.se\.fc[12]\.bias$", key)}
    if any(state[key].any() for key in biases):
        raise UserError(
            "moskomule's SE blocks have no biases, and these are not zero; "
            'use "timm", or a network made with bias=False'
        )
    kept = {key: tensor for key, tensor in state.items() if key not in biases}
    return _rename(kept, (r"\.se\.fc1\.", ".se.fc.0."), (r"\.se\.fc2\.", ".se.fc.2."))


# --- BN-Inception of pretrainedmodels, from Caffe ----------------------------------------------

_CAFFE_STEM = {
    "conv1_7x7_s2": "conv1",
    "conv2_3x3_reduce": "conv2_reduce",
    "conv2_3x3": "conv2",
}


def _caffe_layer(name: str) -> str:
    """Our module for a layer of theirs: inception_3a_3x3_reduce → inception_3a.conv_3x3_reduce."""
    if name in _CAFFE_STEM:
        return _CAFFE_STEM[name]
    found = re.fullmatch(r"(inception_\d\w)_(.+)", name)
    if found is None:
        return name
    module, layer = found.groups()
    return f"{module}.{'conv_' + layer if layer[0].isdigit() else layer}"


def _from_bninception(state: State, model: Network) -> State:
    decoded: State = {}
    biases: State = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        if name == "last_linear":
            decoded[f"{model.head}.{kind}"] = tensor
        elif name.endswith("_bn"):
            decoded[f"{_caffe_layer(name.removesuffix('_bn'))}.bn.{kind}"] = tensor
        elif kind == "bias":
            biases[_caffe_layer(name)] = tensor
        else:
            decoded[f"{_caffe_layer(name)}.conv.{kind}"] = tensor
    # Theirs convolve with a bias; the batch norm behind subtracts it if its mean is lowered by it.
    for layer, bias in biases.items():
        mean = f"{layer}.bn.running_mean"
        if mean in decoded:
            decoded[mean] = decoded[mean] - bias
    return decoded


def _to_bninception(state: State, model: Network) -> State:
    stem = {ours: theirs for theirs, ours in _CAFFE_STEM.items()}
    encoded: State = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if layer == model.head:
            encoded[f"last_linear.{kind}"] = tensor
            continue
        layer, _, part = layer.rpartition(".")
        if part not in ("conv", "bn"):
            raise UserError(f"the layout of bninception has no SE blocks, so no place for {key}")
        name = stem.get(layer) or layer.replace(".conv_", "_").replace(".", "_")
        encoded[f"{name}{'_bn' if part == 'bn' else ''}.{kind}"] = tensor
        if part == "conv":
            encoded[f"{name}.bias"] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return encoded


def _plain_only(layout: str) -> Callable[[State, Network], State]:
    def encode(state: State, model: Network) -> State:
        gates = [key for key in state if ".se." in key]
        if gates:
            raise UserError(f"{layout} has no SE networks, so no place for {gates[0]}")
        return dict(state)

    return encode


def _any(state: State, pattern: str, test: Callable[[Tensor], bool] = lambda _: True) -> bool:
    return any(re.search(pattern, key) and test(tensor) for key, tensor in state.items())


# The first that detects a state dict has it, so the most particular ones stand first.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "bninception",
            "pretrainedmodels' bninception, from Caffe",
            lambda state: "conv1_7x7_s2.weight" in state,
            _from_bninception,
            _to_bninception,
            None,
            lambda model: preprocessing(
                model,
                mean=(104.0, 117.0, 128.0),
                std=(1.0, 1.0, 1.0),
                channel_order="bgr",
                value_range=255.0,
            ),
        ),
        Layout(
            "legacy",
            "pretrainedmodels' se_* and timm's legacy_se*, from Caffe",
            lambda state: _any(state, r"^layer0\."),
            _from_legacy,
            _to_legacy,
            "caffe",
            _common_preprocessing("bilinear"),
        ),
        Layout(
            "pretrainedmodels",
            "plain networks of pretrainedmodels",
            lambda state: "last_linear.weight" in state,
            _from_pretrainedmodels,
            _to_pretrainedmodels,
            None,
            _common_preprocessing("bilinear"),
        ),
        Layout(
            "moskomule",
            "moskomule/senet.pytorch",
            lambda state: _any(state, r"\.se\.fc\.0\.weight$"),
            _from_moskomule,
            _to_moskomule,
            "torch",
            _common_preprocessing("bilinear"),
        ),
        Layout(
            "timm",
            "timm",
            lambda state: (
                _any(state, r"\.se\.fc1\.weight$", lambda tensor: tensor.ndim == 4)
                or "pre_logits.fc1.weight" in state
            ),
            _from_timm,
            _to_timm,
            "torch",
            _common_preprocessing("bicubic"),
        ),
        Layout(
            "senet",
            "senet",
            lambda state: _any(state, r"(^|\.)se\.fc1\.weight$"),
            _same,
            _same,
            None,
            lambda model: None,
        ),
        # Plain networks are named as in torchvision, and as in timm.
        Layout(
            "torchvision",
            "torchvision",
            lambda state: True,
            _same,
            _plain_only("torchvision"),
            None,
            _common_preprocessing("bilinear"),
        ),
    )
}


def detect(state: State) -> Layout:
    """The layout that a state dict is in, by its names and shapes."""
    return next(layout for layout in LAYOUTS.values() if layout.detect(state))
