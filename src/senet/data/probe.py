"""What the images of a data set have in common, by the headers of many of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from senet.data.arrays import Depth, Header
from senet.errors import UserError

PROBES = 10_000
SMALL = 64
"""Pixels up to which an image is used whole instead of resized and cropped."""


@dataclass(frozen=True)
class Kind:
    """What images are like.

    Attributes:
        channels: 1 if all are grey, 3 if they are colours, or grey and colours; otherwise as many
            as each of them has.
        side: of square images of up to `SMALL` pixels, if all are of that size; otherwise None.
        depth: "16" or "float" if all are, otherwise "8".
    """

    channels: int
    side: int | None
    depth: Depth = "8"


def probed(n: int) -> list[int]:
    """Which of n images are looked at: all, or `PROBES` at random, so that no order deceives."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:PROBES].tolist()


def kind_of(headers: Iterable[Header], channels: int | None = None, *, side: bool = True) -> Kind:
    """What the images of these headers are; reads no more of them than it takes to know.

    Args:
        headers: of the images.
        channels: as many as are asked for; None: as many as they have.
        side: whether that is asked for; otherwise it is None.

    Raises:
        UserError: they differ in channels (grey and colours do not count, nor where `channels` are
            asked for), or some are floating-point and some are not.
    """
    counts, depths, sizes = set[int](), set[Depth](), set[tuple[int, int]]()
    for header in headers:
        counts.add(header.channels)
        depths.add(header.depth)
        sizes.add(header.size)
        settled = channels is not None or (3 in counts and counts <= {1, 3})
        if settled and "8" in depths and not (side and _side(sizes)):
            break
    if not counts:
        return Kind(channels or 3, None)
    if channels is None and len(counts) > 1 and not counts <= {1, 3}:
        each = ", ".join(map(str, sorted(counts)))
        raise UserError(
            f"the images differ in their channels, they have {each}: give those of one kind, or "
            f"--channels {max(counts)} --skip-bad-images, which leaves out the others"
        )
    if "float" in depths and len(depths) > 1:
        raise UserError(
            "some images have floating-point pixels and some whole numbers, which have a range: "
            "give those of one kind"
        )
    depth: Depth = depths.pop() if len(depths) == 1 else "8"
    found = 3 if 3 in counts else counts.pop()
    return Kind(channels or found, _side(sizes) if side else None, depth)


def _side(sizes: set[tuple[int, int]]) -> int | None:
    if len(sizes) != 1:
        return None
    width, height = next(iter(sizes))
    return width if width == height <= SMALL else None
