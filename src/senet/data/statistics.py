"""What the training images of a data set are like: their pixels, sizes and classes."""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from senet.data.image_data import ImageData, map_style

SAMPLE = 10_000  # images that are looked at, evenly spread over the data
_LEAST_DEVIATION = 1 / 255  # of a channel that is the same everywhere


@dataclass(frozen=True)
class Statistics:
    """Pixels, sizes and classes of training images.

    Attributes:
        images: of the training set.
        measured: how many of them were looked at.
        mean: of each channel over all pixels of the prepared images, in [0, 1].
        std: standard deviation, likewise.
        smallest: width and height of the smallest image by area, as it is stored.
        largest: likewise.
        counts: training images of each class, by its name; of those looked at.
    """

    images: int
    measured: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    counts: dict[str, int]


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
    pixels = data.preprocessing.pixels()
    channels = data.preprocessing.channels
    total, squares, n = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    sizes, counts = [], [0] * len(data.classes)
    for index in chosen.tolist():
        image, label = source[index]
        sizes.append(image.size)
        counts[label] += 1
        values = F.to_dtype(pixels(image), torch.float64, scale=True).flatten(1)
        total += values.sum(1)
        squares += values.square().sum(1)
        n += values.shape[1]
    mean = total / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt().clamp(min=_LEAST_DEVIATION)
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    return Statistics(
        images=len(source),
        measured=len(chosen),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        smallest=by_area[0],
        largest=by_area[-1],
        counts=dict(zip(data.classes, counts, strict=True)),
    )
