"""What the images of a data set have in common, by the headers of many of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from senet.data.images import Header

PROBES = 10_000
SMALL = 64
"""Pixels up to which an image is used whole instead of resized and cropped."""


@dataclass(frozen=True)
class Kind:
    """What images are like.

    Attributes:
        channels: 1 if all are grey, otherwise 3.
        side: of square images of up to `SMALL` pixels, if all are of that size; otherwise None.
    """

    channels: int
    side: int | None


def probed(n: int) -> list[int]:
    """Which of n images are looked at: all, or `PROBES` at random, so that no order deceives."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:PROBES].tolist()


def kind_of(headers: Iterable[Header]) -> Kind:
    """What the images of these headers are; reads no more of them than it takes to know."""
    grey, sizes = True, set[tuple[int, int]]()
    for header in headers:
        grey &= header.grey
        sizes.add(header.size)
        if not grey and _side(sizes) is None:
            break
    return Kind(1 if grey and sizes else 3, _side(sizes))


def _side(sizes: set[tuple[int, int]]) -> int | None:
    if len(sizes) != 1:
        return None
    width, height = next(iter(sizes))
    return width if width == height <= SMALL else None
