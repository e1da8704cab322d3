"""How an image becomes the network's input: preprocessing (always) and augmentation (training)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from senet.data.arrays import FULL, Depth, is_picture
from senet.data.augmentation import Augmentation
from senet.data.images import Picture, to_mode
from senet.errors import UserError

Pixels = npt.NDArray[Any]
Transform = Callable[[Picture], Tensor]
Interpolation = Literal["bilinear", "bicubic"]
ChannelOrder = Literal["rgb", "bgr"]
RANDAUGMENT = (2, 9)  # operations and magnitude, torchvision's own
_LONGEST = 16


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; kept in every checkpoint.

    Attributes:
        image_size: height and width of the input in pixels.
        resize: the shorter side is resized to this many pixels before the centre crop; None
            resizes nothing, and a smaller image is padded with black.
        mean: subtracted from each channel, in units of `value_range` and in `channel_order`.
        std: divides each channel, likewise.
        channels: 1 (grey), 3 (colour), or as many as the images have.
        interpolation: of the resize, with antialiasing.
        channel_order: "rgb", or "bgr" as networks from Caffe take colours.
        value_range: what full intensity is before mean and std: 1.0, or 255.0 (Caffe).
        depth: what images are decoded to: "8" (full intensity is 255), "16" (65535), or "float":
            numbers that are taken as they are, without a full intensity.

    Raises:
        ValueError: a value outside its range, or as many means or deviations as channels missing.
    """

    image_size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    interpolation: Interpolation = "bilinear"
    channel_order: ChannelOrder = "rgb"
    value_range: float = 1.0
    depth: Depth = "8"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        object.__setattr__(self, "value_range", float(self.value_range))
        if type(self.channels) is not int or self.channels < 1:
            raise ValueError(f"channels must be a whole number from 1, not {self.channels!r}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, not {self.image_size!r}")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize must be None or at least image_size {self.image_size}, not {self.resize!r}"
            )
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean and std need {self.channels} values (one a channel), not {self.mean} and "
                f"{self.std}"
            )
        if not all(math.isfinite(value) for value in self.mean) or not all(
            math.isfinite(value) and value > 0 for value in self.std
        ):
            raise ValueError(f"mean must be finite and std positive, not {self.mean}, {self.std}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation must be bilinear or bicubic, not {self.interpolation!r}"
            )
        if self.channel_order not in get_args(ChannelOrder):
            raise ValueError(f"channel_order must be rgb or bgr, not {self.channel_order!r}")
        if self.channel_order == "bgr" and self.channels != 3:
            raise ValueError("channel_order bgr needs 3 channels; others have no such order")
        if self.value_range not in (1.0, 255.0):
            raise ValueError(f"value_range must be 1 or 255, not {self.value_range!r}")
        if self.depth not in get_args(Depth):
            raise ValueError(f"depth must be one of {get_args(Depth)}, not {self.depth!r}")
        if self.depth == "float" and self.value_range != 1:
            raise ValueError("floating-point images have no full intensity: value_range must be 1")

    def resized(self, image_size: int) -> "Preprocessing":
        """The same for another side, with the share that the centre crop keeps."""
        resize = self.resize
        if resize is not None:
            resize = round(resize * image_size / self.image_size)
        return dataclasses.replace(self, image_size=image_size, resize=resize)

    @property
    def _mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)

    def _fit(self, shorter_side: int | None) -> list[Callable[[Any], Any]]:
        """Right mode, resized, cropped to image_size."""
        steps: list[Callable[[Any], Any]] = [self._taken]
        if shorter_side is not None:
            steps.append(_cut_to_ratio)
            steps.append(v2.Resize(shorter_side, interpolation=self._mode, antialias=True))
        return [*steps, v2.CenterCrop(self.image_size)]

    def _taken(self, image: Picture) -> Picture:
        """A decoded image as the steps take it: of Pillow, or uint8 or float32 (C,H,W).

        16 bits become float32 in [0, 1].
        """
        if is_picture(self.channels, self.depth):
            if isinstance(image, Tensor):
                raise ValueError(f"a tensor of {len(image)} channels is no 8-bit grey or RGB image")
            return to_mode(image, self.channels)
        pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        if len(pixels) != self.channels:
            raise ValueError(f"an image of {len(pixels)} channels, where {self.channels} are taken")
        return pixels if pixels.dtype == torch.uint8 else _unit(pixels)

    def finish(self, images: Tensor) -> Tensor:
        """Scale (…,C,H,W) to `value_range` and normalize: float32 of the same shape.

        Args:
            images: uint8, uint16, or float32 (in [0, 1] for depth "16", as it is for "float");
                colours in the order RGB, the result has them in `channel_order`.
        """
        if images.dtype == torch.uint8:
            scaled = F.to_dtype(images, torch.float32, scale=self.value_range == 1.0)
        else:
            scaled = _unit(images) * self.value_range
        if self.channel_order == "bgr":
            scaled = scaled.flip(-3)
        return F.normalize(scaled, list(self.mean), list(self.std), inplace=True)

    def finish_batch(self, images: Pixels) -> Tensor:
        """`finish` of many images, (N,C,H,W), bit for bit.

        Of uint8 there are only 256 values a channel, so it is a table. NumPy, because PyTorch would
        start its threads for each of the steps, which takes longer than the work where cores are
        busy.
        """
        if images.dtype != np.uint8:
            return self.finish(torch.from_numpy(images))
        levels = torch.arange(256, dtype=torch.uint8).expand(self.channels, 1, 256)
        table = self.finish(levels).numpy().reshape(self.channels, 256)
        finished = np.empty(images.shape, np.float32)
        for channel in range(self.channels):
            # The table's rows are those of the result; it swaps the colours' places.
            source = 2 - channel if self.channel_order == "bgr" else channel
            # "clip": NumPy looks no index up beforehand, and none of uint8 lies outside.
            np.take(table[channel], images[:, source], out=finished[:, channel], mode="clip")
        return torch.from_numpy(finished)

    def pixels(self) -> Transform:
        """`transform` up to the normalization: image → (C,H,W), for `finish_batch`.

        uint8, or float32 for a depth beyond 8 bits.
        """
        return v2.Compose([*self._fit(self.resize), _as_tensor])

    def transform(self) -> Transform:
        """The evaluation transform: decoded image of any size → (C,H,W) float32.

        Resizes the shorter side, crops the centre, scales to `value_range` and normalizes
        (paper, section 5: resize to 256, centre crop 224).
        """
        return v2.Compose([*self._fit(self.resize), _as_tensor, self.finish])

    def with_channels(self, channels: int) -> Self:
        """The same for another number of channels: each has the mean of their means, deviations."""
        if channels == self.channels:
            return self
        mean, std = ((sum(values) / len(values),) * channels for values in (self.mean, self.std))
        return dataclasses.replace(self, mean=mean, std=std, channels=channels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or TOML, without the fields that are None (TOML has no None).

        And without a `depth` of 8 bits: files of earlier releases, and for them, do not have it.
        """
        values = dataclasses.asdict(self)
        if self.depth == "8":
            del values["depth"]
        values["mean"], values["std"] = list(self.mean), list(self.std)
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Inverse of `to_dict`; without `channel_order` and `value_range` they are RGB and 0-1.

        And without `depth` 8 bits.

        Raises:
            ValueError: a field is unknown or missing, or its value is invalid.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        missing = fields - values.keys() - {"resize", "channel_order", "value_range", "depth"}
        if unknown := values.keys() - fields:
            raise ValueError(f"unknown preprocessing fields {sorted(unknown)}")
        if missing:
            raise ValueError(f"preprocessing lacks {sorted(missing)}")
        return cls(**{"resize": None, **values})


def _unit(pixels: Tensor) -> Tensor:
    """uint16 as float32 in [0, 1]; other numbers as float32, as they are."""
    full = FULL if pixels.dtype == torch.uint16 else 1
    return pixels.to(torch.float32) / full


def _as_tensor(image: Picture) -> Tensor:
    return image if isinstance(image, Tensor) else F.pil_to_tensor(image)


def check_augmentation(augmentation: Augmentation, channels: int, depth: Depth) -> None:
    """Refuse what is defined for 8-bit grey and RGB images alone.

    Args:
        augmentation: of a recipe.
        channels: of the images.
        depth: of their pixels.

    Raises:
        UserError: a policy, which changes colours, or a jitter in levels of 255 where nothing is
            255.
    """
    if is_picture(channels, depth):
        return
    kind = f"{channels} channels of {'floating point' if depth == 'float' else f'{depth} bits'}"
    policy = "randaugment" if augmentation.randaugment is not None else augmentation.policy
    if policy != "none":
        off = "--policy none" if augmentation.randaugment is None else "--randaugment off"
        raise UserError(
            f"{policy} changes the colours of 8-bit grey or RGB images, these have {kind}: leave "
            f"it out ({off})"
        )
    if augmentation.jitter and depth == "float":
        raise UserError(
            f"jitter {augmentation.jitter:g} counts levels of 0-255, these images have {kind}, "
            "without a range: leave it out (--jitter 0)"
        )


def training_transform(augmentation: Augmentation, preprocessing: Preprocessing) -> Transform:
    """The training transform of one image: decoded image → (C,H,W) float32.

    Draws from PyTorch's global generator of the CPU only. Mixup and cutmix are not in it (see
    `batch_transform`).

    Raises:
        UserError: as for `check_augmentation`.
    """
    check_augmentation(augmentation, preprocessing.channels, preprocessing.depth)
    size, mode = preprocessing.image_size, preprocessing._mode
    steps: list[Callable[[Any], Any]]
    if augmentation.crop == "random_resized":
        steps = [
            preprocessing._taken,
            v2.RandomResizedCrop(
                size, augmentation.scale, augmentation.ratio, mode, antialias=True
            ),
        ]
        if augmentation.flip:
            steps.append(v2.RandomHorizontalFlip())
    else:
        # The padded crop moves within the whole image, so its shorter side fills the input.
        shorter = preprocessing.resize if augmentation.crop == "none" else size
        steps = preprocessing._fit(shorter if preprocessing.resize is not None else None)
        if augmentation.padding or augmentation.flip:
            steps.append(PaddedCropFlip(augmentation.padding, augmentation.flip))
    if augmentation.rotation:
        steps.append(v2.RandomRotation(augmentation.rotation, InterpolationMode.BILINEAR))
    if (policy := _policy(augmentation, mode)) is not None:
        steps.append(policy)
    steps.append(_as_tensor)
    if augmentation.jitter:
        steps.append(PixelJitter(augmentation.jitter))
    steps.append(preprocessing.finish)
    if augmentation.random_erasing:
        steps.append(v2.RandomErasing(augmentation.random_erasing))
    return v2.Compose(steps)


def _policy(augmentation: Augmentation, mode: InterpolationMode) -> Callable[[Any], Any] | None:
    """RandAugment or another policy of torchvision; None for none."""
    if augmentation.randaugment is not None or augmentation.policy == "randaugment":
        operations, magnitude = augmentation.randaugment or RANDAUGMENT
        return v2.RandAugment(operations, magnitude, interpolation=mode)
    if augmentation.policy == "none":
        return None
    policies: dict[str, Callable[..., Any]] = {
        "trivialaugment": v2.TrivialAugmentWide,
        "autoaugment": v2.AutoAugment,
        "augmix": v2.AugMix,
    }
    return policies[augmentation.policy](interpolation=mode)


def batch_transform(
    augmentation: Augmentation, num_classes: int
) -> Callable[[Tensor, Tensor], Any] | None:
    """Mixup or cutmix of a batch, or None where both are off.

    The callable takes images (N,C,H,W) and labels (N,) int64 and returns the images and soft
    labels (N,num_classes) float32; it draws from PyTorch's global generator of the CPU.
    """
    mixes: list[Callable[..., Any]] = []
    if augmentation.mixup:
        mixes.append(v2.MixUp(alpha=augmentation.mixup, num_classes=num_classes))
    if augmentation.cutmix:
        mixes.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=num_classes))
    if len(mixes) == 2:
        return v2.RandomChoice(mixes)
    return mixes[0] if mixes else None


def _cut_to_ratio(image: Picture) -> Picture:
    """The middle of an image that is more than `_LONGEST` times as long as it is wide.

    The centre crop takes no more of it, and a strip of 20,000×1 pixels, resized to a shorter side
    of 256, would be 4 GB. The middle stays where it was, to the pixel.
    """
    sides = F.get_size(image)[::-1]  # width, height
    long = sides.index(max(sides))
    most = _LONGEST * sides[1 - long]
    if sides[long] <= most:
        return image
    start = (sides[long] - most) // 2
    box = [0, 0, *sides]
    box[long], box[2 + long] = start, sides[long] - start
    cut: Picture = F.crop(image, box[1], box[0], box[3] - box[1], box[2] - box[0])
    return cut


@dataclass(frozen=True)
class PaddedCropFlip:
    """Shift an image by up to `padding` pixels (black comes in) and mirror it half of the time.

    The draw is separate from the deed, so that a batch can be done as a whole with the same
    numbers that one PIL image would get.

    Attributes:
        padding: pixels on each side.
        flip: whether to mirror at all.
    """

    padding: int
    flip: bool

    def draw(self, generator: torch.Generator | None = None) -> tuple[int, int, bool]:
        """Top and left of the crop (0 to 2·padding) and whether to mirror."""
        top, left, mirror = torch.rand(3, generator=generator).tolist()
        places = 2 * self.padding + 1
        return int(top * places), int(left * places), self.flip and mirror < 0.5

    def __call__(self, image: Picture) -> Picture:
        """Shift and mirror one image."""
        height, width = F.get_size(image)
        top, left, mirror = self.draw()
        if self.padding:
            image = F.crop(F.pad(image, [self.padding]), top, left, height, width)
        return F.horizontal_flip(image) if mirror else image

    def batch(self, images: Pixels, draws: list[tuple[int, int, bool]]) -> Pixels:
        """Shift and mirror (N,C,H,W), image i by draws[i].

        In NumPy: on images this small, an operation of PyTorch is mostly overhead.
        """
        height, width = images.shape[-2:]
        margin = (self.padding, self.padding)
        padded = np.pad(images, ((0, 0), (0, 0), margin, margin))
        shifted = np.empty_like(images)
        for i, (top, left, mirror) in enumerate(draws):
            crop = padded[i, :, top : top + height, left : left + width]
            shifted[i] = crop[..., ::-1] if mirror else crop
        return shifted


@dataclass(frozen=True)
class PixelJitter:
    """Shift each channel of an image (C,H,W) by a random number of levels of 0-255, within these.

    Of uint8, rounded; or of float32 in [0, 1], by as many 255ths.

    Attributes:
        levels: greatest shift either way (uniform).
    """

    levels: float

    def __call__(self, image: Tensor) -> Tensor:
        """Shift one image."""
        shift = (torch.rand(image.shape[0], 1, 1) * 2 - 1) * self.levels
        if image.dtype != torch.uint8:
            return (image + shift / 255).clamp(0, 1)
        return (image + shift).round().clamp(0, 255).to(torch.uint8)
