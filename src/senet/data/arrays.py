"""Images of any number of channels, of 8 or 16 bits or floating point, as arrays."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from senet.data.metadata import upright
from senet.errors import UserError

Depth = Literal["8", "16", "float"]
"""What a pixel is: uint8, uint16, or float32 with a range of its own."""
Array = npt.NDArray[Any]
"""An image: (C,H,W) uint8, uint16 or float32."""
Meaning = Literal["", "alpha", "rgb"]
MODES = {1: "L", 3: "RGB"}
FULL = 65535  # 16-bit white
_DTYPES: dict[Depth, Any] = {"8": np.uint8, "16": np.uint16, "float": np.float32}
WORDS: dict[Depth, str] = {
    "8": "8-bit pixels",
    "16": "16-bit pixels",
    "float": "floating-point pixels",
}
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow makes grey of colours


class Header(NamedTuple):
    """What an image file says of itself.

    Attributes:
        channels: 1 for grey, 3 for colours, transparency not counted, palettes as colours; others
            as they are.
        depth: of its pixels.
        size: width and height as stored, pixels.
    """

    channels: int
    depth: Depth
    size: tuple[int, int]

    @property
    def grey(self) -> bool:
        return self.channels == 1


class Stored(NamedTuple):
    """An image as its file holds it.

    Attributes:
        array: its channels.
        meaning: "alpha" where the last channel is transparency, "rgb" where the first three are
            colours and there are more; "" otherwise.
    """

    array: Array
    meaning: Meaning = ""


def is_picture(channels: int, depth: Depth) -> bool:
    """Whether images are 8-bit grey or RGB, which Pillow holds and its operations know."""
    return depth == "8" and channels in MODES


def check_turbo(decoder: str | None, what: str, channels: int, depth: Depth) -> None:
    """Refuse the decoder "turbo" for images that no JPEG file holds.

    Args:
        decoder: the one that was asked for, or None.
        what: the images are, for the error.
        channels: of the images.
        depth: of their pixels.

    Raises:
        UserError: it is "turbo", and they are not 8-bit grey or RGB.
    """
    if decoder == "turbo" and not is_picture(channels, depth):
        raise UserError(
            f"decode 'turbo' is for JPEG, 8-bit grey or RGB: leave it out for {what} of "
            f"{channels} channels and depth {depth}"
        )


def most_bytes() -> int:
    """Bytes that a decoded image may take: an RGBA picture at Pillow's limit of pixels."""
    return 4 * (Image.MAX_IMAGE_PIXELS or 2**40)


def check_size(width: int, height: int, bytes_a_pixel: int) -> None:
    """Refuse what is larger than Pillow would decode, before memory is taken.

    Raises:
        DecompressionBombError: too many pixels.
        ValueError: none, or too many bytes of them.
    """
    if width < 1 or height < 1:
        raise ValueError(f"it has {width}×{height} pixels")
    pixels = width * height
    if pixels > (Image.MAX_IMAGE_PIXELS or pixels):
        raise Image.DecompressionBombError(f"{width}×{height} pixels")
    if pixels * bytes_a_pixel > most_bytes():
        raise ValueError(
            f"{pixels * bytes_a_pixel:,} bytes of pixels are more than the limit of "
            f"{most_bytes():,} (four a pixel at Pillow's limit of pixels); make it smaller"
        )


def depth_of(dtype: np.dtype[Any]) -> Depth:
    """What pixels of a dtype are.

    Raises:
        ValueError: integers whose range is unknown, or no numbers.
    """
    if dtype.kind == "f":
        return "float"
    if dtype.kind in "ub" and dtype.itemsize <= 2:  # in any order of bytes
        return "8" if dtype.itemsize == 1 else "16"
    raise ValueError(f"{dtype} pixels have no known range: store uint8, uint16 or float32")


def channel_axis(shape: tuple[int, ...]) -> int:
    """Which axis of three holds the channels: the shorter of the first and the last.

    The last where they are equal.
    """
    return 0 if shape[0] < shape[-1] else 2


def split_shape(shape: tuple[int, ...], axis: int | None = None) -> tuple[int, int, int]:
    """Height, width and channels of two or three axes; `axis` as for `channels_first`."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    axis = channel_axis(shape) if axis is None else axis
    height, width = (length for place, length in enumerate(shape) if place != axis)
    return height, width, shape[axis]


def channels_first(pixels: Array, axis: int | None = None) -> Array:
    """(H,W), (H,W,C) or (C,H,W) of any dtype as an image.

    Args:
        pixels: the array.
        axis: of the channels; None: none of two axes, `channel_axis` of three.

    Raises:
        ValueError: a dtype without a known range.
    """
    depth = depth_of(pixels.dtype)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    pixels = pixels.astype(_DTYPES[depth], copy=False)
    if pixels.ndim == 2:
        return pixels[None]
    return np.moveaxis(pixels, channel_axis(pixels.shape) if axis is None else axis, 0)


def of_picture(image: Image.Image, again: Callable[[], Image.Image], channels: int) -> Stored:
    """A picture that Pillow opened, with all its channels and bits.

    Args:
        image: not loaded yet.
        again: opens it once more.
        channels: that will be asked for: a CMYK picture gives its four, otherwise its colours.

    Raises:
        ValueError: 32-bit integers with values beyond 16 bits.
    """
    if deep_png(image):
        # Pillow's unpackers take one byte of two, the high one of a big-endian pair; told that the
        # same bytes are little-endian, the low one.
        low: Any = again()
        low.tile = [tile._replace(args=f"{image.mode};16L") for tile in low.tile]
        high, rest = (np.asarray(upright(part)) for part in (image, low))
        pixels = (high.astype(np.uint16) << 8) | rest
    else:
        image.load()
        if image.mode in ("1", "La", "RGBa"):
            image = image.convert({"1": "L", "La": "LA", "RGBa": "RGBA"}[image.mode])
        elif image.mode in ("P", "PA") or "transparency" in image.info:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        elif image.mode in ("YCbCr", "LAB", "HSV") or (image.mode == "CMYK" and channels != 4):
            image = image.convert("RGB")
        pixels = np.asarray(upright(image))
        if image.mode.startswith("I"):
            pixels = within_16_bits(pixels)
    return Stored(channels_first(pixels, 2), "alpha" if image.mode in ("LA", "RGBA") else "")


def deep_png(image: Image.Image) -> bool:
    """Whether a picture is a PNG with 16-bit colours, of which Pillow gives 8 bits."""
    tiles: Any = getattr(image, "tile", None) if image.format == "PNG" else None
    return bool(tiles) and tiles[0].args in ("RGB;16B", "RGBA;16B")


def within_16_bits(pixels: Array) -> Array:
    """Integers as uint16.

    Raises:
        ValueError: some are outside of 0 to 65535.
    """
    if pixels.size and (pixels.min() < 0 or pixels.max() > FULL):
        raise ValueError("32-bit pixels have no known range; convert it to 8 or 16 bits")
    return pixels.astype(np.uint16)


def fitted(stored: Stored, channels: int, depth: Depth) -> tuple[Array, bool]:
    """An image with the channels and depth that are asked for, and whether it was transparent.

    Transparency that is not asked for is laid on white, grey repeated for colours, colours made
    grey; other numbers of channels are never changed. 8 and 16 bits are scaled to each other.

    Raises:
        ValueError: it has other channels, floating-point pixels where others are asked for or the
            other way round, or numbers that are not finite.
    """
    array, meaning = stored
    count, clear = len(array), False
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise ValueError("it has pixels that are no finite numbers")
    if meaning == "alpha" and channels != count:
        array, clear = _on_white(array)
    elif meaning == "rgb" and channels == 3:
        array = array[:3]
    array = _with_depth(array, depth)
    if len(array) == 1 and channels == 3:
        array = np.repeat(array, 3, axis=0)
    elif len(array) == 3 and channels == 1:
        grey = np.tensordot(_LUMA, array.astype(np.float64), 1)[None]
        array = (grey if depth == "float" else grey.round()).astype(array.dtype)
    if len(array) != channels:
        raise ValueError(f"it has {count} channels, where {channels} are needed")
    return np.ascontiguousarray(array), clear


def _on_white(array: Array) -> tuple[Array, bool]:
    full = np.iinfo(array.dtype).max
    if (array[-1] == full).all():
        return array[:-1], False
    opacity = array[-1] / full
    laid = full + (array[:-1].astype(np.float64) - full) * opacity
    return laid.round().astype(array.dtype), True


def _with_depth(array: Array, depth: Depth) -> Array:
    stored = depth_of(array.dtype)
    if stored == depth:
        return array
    if "float" in (stored, depth):
        raise ValueError(
            f"it has {WORDS[stored]}, where {WORDS[depth]} are needed; the one has a range of "
            "its own, the other not"
        )
    if depth == "16":
        return array.astype(np.uint16) * 257
    return ((array.astype(np.uint32) * 255 + FULL // 2) // FULL).astype(np.uint8)


def shown(array: Array) -> Image.Image:
    """A picture of an image, for people: its first three channels, or its first.

    What is not 8-bit is stretched from its least to its greatest value.
    """
    part = array[:3] if len(array) >= 3 else array[:1]
    if part.dtype != np.uint8:
        least, greatest = float(part.min()), float(part.max())
        scale = 255 / (greatest - least) if greatest > least else 0.0
        part = ((part.astype(np.float64) - least) * scale).round().astype(np.uint8)
    return as_picture(part)


def as_picture(array: Array) -> Image.Image:
    """8-bit grey (1,H,W) or RGB (3,H,W) as Pillow holds it."""
    last = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(last))
