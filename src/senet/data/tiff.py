"""TIFF of any number of bands and any depth, through tifffile, where Pillow would lose some.

tifffile is Python and NumPy alone, and maintained by those who know the format's scientific
dialects; Pillow reads four bands of 8 bits, or one.
"""

import contextlib
import io
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from senet.data.arrays import (
    Array,
    Header,
    Meaning,
    Stored,
    channels_first,
    check_size,
    depth_of,
    most_bytes,
    split_shape,
)

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
INSTALL = "pip install 'senet[tiff]'"
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate"}
_DEFLATE = (8, 32946)
_MOST_DEFLATED = 1032  # bytes that a byte can become (zlib's documentation)
_MOST = {1: 1, 5: 2731, 8: _MOST_DEFLATED, 32773: 64, 32946: _MOST_DEFLATED}
_RGB = 2
_PHOTOMETRICS = (1, _RGB, 5)  # black is zero, RGB, separated
_MOST_PAGES = 4096
_BITS, _DESCRIPTION, _ORIENTATION, _SAMPLES = 258, 270, 274, 277
_TURNS = {2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}
# What tifffile raises on files that are damaged.
_ERRORS = (AttributeError, AssertionError, RuntimeError, struct.error, zlib.error, MemoryError)
_told: list[str] = []


def tifffile_or_none() -> Any:
    """The package tifffile, or None where it is not installed."""
    try:
        import tifffile
    except ImportError:
        return None
    logger = logging.getLogger("tifffile")
    if not logger.handlers:  # its remarks on odd files would go to stderr
        logger.addHandler(logging.NullHandler())
    return tifffile


def is_for_tifffile(image: Image.Image, name: str, *, bits: bool) -> bool:
    """Whether Pillow would lose bands or pages, or with `bits` bits, of a TIFF that it can open.

    Where tifffile is missing, a warning says so once, and Pillow reads what it can.

    Args:
        image: opened, not loaded.
        name: what the warning calls it.
        bits: whether more than 8 of a colour are asked for.
    """
    if image.format != "TIFF":
        return False
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    samples = tags.get(_SAMPLES, 1)
    deep = bits and samples > 1 and max(tags.get(_BITS, (1,))) > 8
    pages = getattr(image, "n_frames", 1)
    palette = image.mode in ("P", "PA", "1")
    loses = (samples != len(image.getbands()) and not palette) or deep or _is_stack(image, pages)
    if loses and tifffile_or_none() is None:
        if not _told:
            _told.append(name)
            warnings.warn(
                f"{name} has bands, pages or bits that only tifffile reads, and are left out: "
                f"{INSTALL}",
                stacklevel=2,
            )
        return False
    return loses


def _is_stack(image: Image.Image, pages: int) -> bool:
    """Whether pages are channels: as ImageJ, OME and tifffile itself write them."""
    if not 1 < pages <= _MOST_PAGES:
        return False
    said = str(image.tag_v2.get(_DESCRIPTION, ""))  # type: ignore[attr-defined]
    return said.startswith(("ImageJ=", '{"shape":')) or said.rstrip().endswith("OME>")


def tiff_header(data: bytes) -> Header:
    """What a TIFF says of its image.

    Raises:
        ValueError: it is damaged, or of a form that is not read.
    """
    with _opened(data) as file:
        form = _form(file)
        height, width, channels = split_shape(form.shape, form.axis)
        return Header(channels - (form.meaning == "alpha"), depth_of(form.dtype), (width, height))


def read_tiff(data: bytes) -> Stored:
    """The image of a TIFF.

    Raises:
        ValueError: it is damaged, of a form that is not read, or larger than it says.
    """
    with _opened(data) as file:
        form = _form(file)
        promised = math.prod(form.shape) * form.dtype.itemsize
        if promised > len(data) * _MOST[int(file.pages[0].compression)]:
            raise ValueError(f"it is cut short: it has no {promised:,} bytes of pixels")
        pages = file.pages if form.stack else file.pages[:1]
        for page in pages:
            _check_segments(page, data)
        try:
            pixels: Array = file.asarray(key=slice(None) if form.stack else 0, maxworkers=1)
        except KeyError as error:  # no codec
            kind = _COMPRESSIONS[int(file.pages[0].compression)]
            raise ValueError(
                f"{kind} compression needs imagecodecs: pip install imagecodecs"
            ) from error
        if pixels.shape != form.shape:
            raise ValueError("its pages are not what the first one says")
        orientation = file.pages[0].tags.get(_ORIENTATION)
        array = channels_first(pixels, form.axis)
        return Stored(_turned(array, orientation and orientation.value), form.meaning)


class _Form(NamedTuple):
    shape: tuple[int, ...]
    axis: int | None
    dtype: np.dtype[Any]
    stack: bool
    meaning: Meaning


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """A TIFF opened by tifffile, whose errors at damaged ones are ValueErrors."""
    tifffile = tifffile_or_none()
    if tifffile is None:
        raise ValueError(f"a TIFF of this form needs tifffile: {INSTALL}")
    try:
        # Other files that OME's or ImageJ's description names are not looked for.
        with tifffile.TiffFile(io.BytesIO(data), name="image", _multifile=False) as file:
            yield file
    except _ERRORS as error:
        raise ValueError(f"a damaged TIFF ({type(error).__name__} {error})") from error


def _form(file: Any) -> _Form:
    page = file.pages[0]
    if int(page.photometric) not in _PHOTOMETRICS:
        raise ValueError(f"a TIFF of {page.photometric.name} with such pixels is not read")
    if int(page.compression) not in _COMPRESSIONS:
        known = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
        raise ValueError(f"a TIFF of {page.compression.name} is not read, only of {known}")
    if page.dtype is None:
        raise ValueError(f"a TIFF of {page.bitspersample} bits a pixel is not read")
    shape, axis, stack = tuple(page.shape), None, False
    meaning: Meaning = ""
    if len(shape) == 2 and (file.is_shaped or file.is_imagej or file.is_ome):
        count = len(file.pages)
        if 1 < count <= _MOST_PAGES:
            shape, stack = (count, *shape), True
    elif len(shape) == 3 and page.axes in ("YXS", "SYX"):
        axis = page.axes.index("S")
        meaning = _meaning(page, shape[axis])
    if len(shape) not in (2, 3):
        raise ValueError(f"a TIFF of shape {shape} ({page.axes}) is not read")
    height, width, channels = split_shape(shape, axis)
    check_size(width, height, channels * page.dtype.itemsize)
    return _Form(shape, axis, page.dtype, stack, meaning)


def _meaning(page: Any, samples: int) -> Meaning:
    extra = [int(each) for each in page.extrasamples]
    if samples in (2, 4) and extra in ([1], [2]):
        return "alpha"
    return "rgb" if int(page.photometric) == _RGB and samples > 3 else ""


def _check_segments(page: Any, data: bytes) -> None:
    """Refuse compressed strips and tiles that would become far more than the page holds."""
    if int(page.compression) not in _DEFLATE:
        return
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count * _MOST_DEFLATED <= most_bytes():
            continue
        opened = zlib.decompressobj()
        if len(opened.decompress(data[offset : offset + count], most_bytes() + 1)) > most_bytes():
            raise ValueError("a strip or tile of it becomes more than any image may take")


def _turned(array: Array, orientation: Any) -> Array:
    """(C,H,W) as its orientation says (EXIF's numbers)."""
    turn = _TURNS.get(orientation, "") if isinstance(orientation, int) else ""
    if "t" in turn:
        array = array.transpose(0, 2, 1)
    return array[:, :: -1 if "y" in turn else 1, :: -1 if "x" in turn else 1]
