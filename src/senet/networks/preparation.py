"""How networks from elsewhere want their images: as timm and torchvision say, else ImageNet's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from senet import data  # it is loaded at its use, with what the core does without
from senet.support.extras import optional

_SIDE = 224
_IMAGENET: dict[str, Any] = {
    "image_size": _SIDE,
    "resize": 256,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
# Their released weights go with `transform_input=True`, which is no weight: built without it, the
# networks want what it makes of ImageNet's mean and deviation.
_TRANSFORMING = ("googlenet", "inception_v3")


def of_timm(model: nn.Module, channels: int) -> data.Preprocessing:
    """What the configuration of a timm network (`pretrained_cfg`) says."""
    from timm.data.config import resolve_model_data_config

    said = resolve_model_data_config(model)
    side = int(said["input_size"][1])
    mean, std = (tuple(said[name]) for name in ("mean", "std"))
    said_for = data.Preprocessing(
        image_size=side,
        resize=max(side, int(side / said["crop_pct"])),  # rounded down, as timm does
        mean=mean,
        std=std,
        channels=len(mean),
        interpolation="bilinear" if said["interpolation"] == "bilinear" else "bicubic",
    )
    return said_for.with_channels(channels)


def of_torchvision(name: str, weights: Path | None = None) -> data.Preprocessing:
    """What torchvision's weights of a network say that they want.

    Args:
        name: network.
        weights: file whose name may be that of one of the released weights; the first ones count
            where it is not.
    """
    released = list(optional("torchvision.models").get_model_weights(name))
    if not released:
        return imagenet()
    named = [each for each in released if weights and Path(each.url).name == weights.name]
    preset: Any = (named or released)[0].transforms()
    crop = getattr(preset, "crop_size", None)
    if not isinstance(crop, list) or len(crop) != 1 or len(preset.mean) != 3:
        return imagenet()  # of detection, segmentation and video
    half = (0.5, 0.5, 0.5)
    return data.Preprocessing(
        image_size=crop[0],
        resize=preset.resize_size[0],
        mean=half if name in _TRANSFORMING else tuple(preset.mean),
        std=half if name in _TRANSFORMING else tuple(preset.std),
        interpolation="bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
    )


def imagenet() -> data.Preprocessing:
    """How ImageNet networks are evaluated whose own wishes nobody knows."""
    return data.Preprocessing(**_IMAGENET)


def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes in the order of the logits, as torchvision has them."""
    weights = optional("torchvision.models").ResNet18_Weights
    return tuple(weights.IMAGENET1K_V1.meta["categories"])
