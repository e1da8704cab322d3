"""How an image becomes the network's input: preprocessing (always) and augmentation (training)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from senet.data.augmentation import Augmentation
from senet.data.images import MODES, to_mode

Pixels = npt.NDArray[np.uint8]
Transform = Callable[[Image.Image], Tensor]
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
        channels: 1 (grey) or 3 (colour).
        interpolation: of the resize, with antialiasing.
        channel_order: "rgb", or "bgr" as networks from Caffe take colours.
        value_range: what full intensity is before mean and std: 1.0, or 255.0 (Caffe).

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        object.__setattr__(self, "value_range", float(self.value_range))
        if self.channels not in MODES:
            raise ValueError(f"channels must be 1 or 3, not {self.channels!r}")
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
            raise ValueError("channel_order bgr needs 3 channels; grey images have no order")
        if self.value_range not in (1.0, 255.0):
            raise ValueError(f"value_range must be 1 or 255, not {self.value_range!r}")

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
        steps: list[Callable[[Any], Any]] = [functools.partial(to_mode, channels=self.channels)]
        if shorter_side is not None:
            steps.append(_cut_to_ratio)
            steps.append(v2.Resize(shorter_side, interpolation=self._mode, antialias=True))
        return [*steps, v2.CenterCrop(self.image_size)]

    def finish(self, images: Tensor) -> Tensor:
        """Scale uint8 (…,C,H,W) to `value_range` and normalize: float32 of the same shape.

        Args:
            images: colours in the order RGB; the result has them in `channel_order`.
        """
        scaled = F.to_dtype(images, torch.float32, scale=self.value_range == 1.0)
        if self.channel_order == "bgr":
            scaled = scaled.flip(-3)
        return F.normalize(scaled, list(self.mean), list(self.std), inplace=True)

    def finish_batch(self, images: Pixels) -> Tensor:
        """`finish` of many images, (N,C,H,W) uint8, bit for bit.

        There are only 256 values a channel, so it is a table. NumPy, because PyTorch would start
        its threads for each of the steps, which takes longer than the work where cores are busy.
        """
        levels = torch.arange(256, dtype=torch.uint8).expand(self.channels, 1, 256)
        table = self.finish(levels).numpy().reshape(self.channels, 256)
        finished = np.empty(images.shape, np.float32)
        for channel in range(self.channels):
            # The table's rows are those of the result; it swaps the colours' places.
            source = 2 - channel if self.channel_order == "bgr" else channel
            finished[:, channel] = table[channel][images[:, source]]
        return torch.from_numpy(finished)

    def pixels(self) -> Transform:
        """`transform` up to the normalization: PIL image → (C,H,W) uint8, for `finish_batch`."""
        return v2.Compose([*self._fit(self.resize), F.pil_to_tensor])

    def transform(self) -> Transform:
        """The evaluation transform: PIL image of any mode and size → (C,H,W) float32.

        Resizes the shorter side, crops the centre, scales to `value_range` and normalizes
        (paper, section 5: resize to 256, centre crop 224).
        """
        return v2.Compose([*self._fit(self.resize), F.pil_to_tensor, self.finish])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or TOML, without the fields that are None (TOML has no None)."""
        values = dataclasses.asdict(self)
        values["mean"], values["std"] = list(self.mean), list(self.std)
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Inverse of `to_dict`; without `channel_order` and `value_range` they are RGB and 0-1.

        Raises:
            ValueError: a field is unknown or missing, or its value is invalid.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        missing = fields - values.keys() - {"resize", "channel_order", "value_range"}
        if unknown := values.keys() - fields:
            raise ValueError(f"unknown preprocessing fields {sorted(unknown)}")
        if missing:
            raise ValueError(f"preprocessing lacks {sorted(missing)}")
        return cls(**{"resize": None, **values})


def training_transform(augmentation: Augmentation, preprocessing: Preprocessing) -> Transform:
    """The training transform of one image: PIL image → (C,H,W) float32.

    Draws from PyTorch's global generator of the CPU only. Mixup and cutmix are not in it (see
    `batch_transform`).
    """
    size, mode = preprocessing.image_size, preprocessing._mode
    steps: list[Callable[[Any], Any]]
    if augmentation.crop == "random_resized":
        steps = [
            functools.partial(to_mode, channels=preprocessing.channels),
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
    steps.append(F.pil_to_tensor)
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


def _cut_to_ratio(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than `_LONGEST` times as long as it is wide.

    The centre crop takes no more of it, and a strip of 20,000×1 pixels, resized to a shorter side
    of 256, would be 4 GB. The middle stays where it was, to the pixel.
    """
    sides = list(image.size)
    long = sides.index(max(sides))
    most = _LONGEST * sides[1 - long]
    if sides[long] <= most:
        return image
    start = (sides[long] - most) // 2
    box = [0, 0, *sides]
    box[long], box[2 + long] = start, sides[long] - start
    return image.crop((box[0], box[1], box[2], box[3]))


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

    def __call__(self, image: Image.Image) -> Image.Image:
        """Shift and mirror one image."""
        height, width = F.get_size(image)
        top, left, mirror = self.draw()
        if self.padding:
            image = F.crop(F.pad(image, [self.padding]), top, left, height, width)
        return F.horizontal_flip(image) if mirror else image

    def batch(self, images: Pixels, draws: list[tuple[int, int, bool]]) -> Pixels:
        """Shift and mirror (N,C,H,W) uint8, image i by draws[i].

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
    """Shift each channel of a uint8 (C,H,W) by a random number of levels, kept within 0-255.

    Attributes:
        levels: greatest shift either way (uniform).
    """

    levels: float

    def __call__(self, image: Tensor) -> Tensor:
        """Shift one image."""
        shift = (torch.rand(image.shape[0], 1, 1) * 2 - 1) * self.levels
        return (image + shift).round().clamp(0, 255).to(torch.uint8)
