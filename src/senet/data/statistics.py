"""What the training images of a data set are like: their pixels, sizes and classes."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from senet.data.arrays import FULL, Depth
from senet.data.image_data import ImageData, ImageStream, map_style
from senet.data.labels import Target, batched, images_of_each

SAMPLE = 10_000  # images that are looked at, evenly spread over the data
_LEAST_DEVIATION = {"8": 1 / 255, "16": 1 / FULL}  # of a channel that is the same everywhere
_BATCH = 32
_SAME = 1e-6  # of the mean; less is rounding


@dataclass(frozen=True)
class Statistics:
    """Pixels, sizes and classes of training images.

    Attributes:
        images: of the training set.
        measured: how many of them were looked at.
        mean: of each channel over all pixels of the prepared images, in [0, 1]; of
            floating-point pixels in their own units.
        std: standard deviation, likewise.
        smallest: width and height of the smallest image by area, as it is stored.
        largest: likewise.
        counts: training images of each class, by its name; of those looked at.
        depth: what the pixels are: "8", "16" or "float".
    """

    images: int
    measured: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    counts: dict[str, int]
    depth: Depth = "8"


def measure(data: ImageData, limit: int = SAMPLE) -> Statistics:
    """Look at the training images, resized and cropped as an evaluation would.

    Args:
        data: its own mean and deviation do not matter.
        limit: the most images that are opened, evenly spread; the same ones each time.

    Raises:
        UserError: a stream, whose images come in one order only; BadImageError, a subclass.
    """
    source = map_style(data.train, "measuring")
    chosen = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source)), dtype=np.int64))
    return _measured(data, (source[index] for index in chosen.tolist()))


def measure_first(data: ImageData, limit: int) -> Statistics:
    """As `measure`; of a stream, the first images in the order of its files."""
    stream = data.train
    if not isinstance(stream, ImageStream):
        return measure(data, limit)
    keys = itertools.chain.from_iterable(stream.val_batches(_BATCH, 0, 1))
    return _measured(data, map(stream.open, itertools.islice(keys, limit)))


def _measured(data: ImageData, images: Iterable[tuple[Any, Target]]) -> Statistics:
    pixels = data.preprocessing.pixels()
    channels, depth = data.preprocessing.channels, data.preprocessing.depth
    total, squares, n = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    sizes, targets = [], []
    for image, target in images:
        height, width = F.get_size(image)
        sizes.append((width, height))
        targets.append(target)
        prepared = pixels(image)
        scale = prepared.dtype == torch.uint8  # others are in their units already
        values = F.to_dtype(prepared, torch.float64, scale=scale).flatten(1)
        total += values.sum(1)
        squares += values.square().sum(1)
        n += values.shape[1]
    mean = total / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt()
    if depth == "float":
        std = torch.where(std > _SAME * mean.abs(), std, 1.0)
    else:
        std = std.clamp(min=_LEAST_DEVIATION[depth])
    counts = images_of_each(batched(targets), data.task, len(data.classes))
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    return Statistics(
        images=len(data.train),
        measured=len(sizes),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        smallest=by_area[0],
        largest=by_area[-1],
        counts=dict(zip(data.classes, counts.tolist(), strict=True)),
        depth=depth,
    )
