"""Reading image files of any kind, and the two ways in which a data set holds its images."""

import contextlib
import functools
import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from senet.data.arrays import (
    MODES,
    Depth,
    Header,
    Stored,
    as_picture,
    deep_png,
    fitted,
    is_picture,
    most_bytes,
    of_picture,
    shown,
)
from senet.data.decoders import Decoder, tell_what_was_left, turbo_pixels
from senet.data.labels import Target, held, target_at
from senet.data.metadata import upright, without_metadata
from senet.data.npy import ENDING as NPY
from senet.data.npy import MAGIC as NPY_MAGIC
from senet.data.npy import npy_header, read_npy
from senet.data.tiff import MAGICS as TIFF_MAGICS
from senet.data.tiff import is_for_tifffile, read_tiff, tiff_header
from senet.errors import UserError

Picture = Image.Image | Tensor
"""A decoded image: of Pillow where it is 8-bit grey or RGB, else (C,H,W) uint8, uint16 or
float32."""
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
_HEADER_BYTES = 2**20  # of a file, beside its pixels
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO",
    "QOI", "SGI", "PCX", "TGA",
)  # fmt: skip
"""The decoders that an image may start, whatever its name; Pillow alone would also start
Ghostscript (EPS) and lesser-known ones. Some are there in newer releases of Pillow only, HEIF with
the package pillow-heif. (JPEG includes MPO.)"""
_OPTIONAL_ENDINGS = frozenset({".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif"})
_DTYPES = (torch.uint8, torch.uint16, torch.float32)
# Brands of the container that AVIF and HEIC share, and what reads them.
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF"
)
_READERS = {"AVIF": "a newer Pillow (pip install -U pillow)", "HEIF": "pip install pillow-heif"}
# What PIL's decoders raise on broken files, beside OSError (which UnidentifiedImageError is).
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class BadImageError(UserError):
    """An image file that cannot be read; the message is one line with its path and the reason.

    Attributes:
        path: the file.
        why: the reason.
    """

    def __init__(self, path: str | os.PathLike[str], why: str) -> None:
        self.path = os.fspath(path)
        self.why = " ".join(why.split())
        super().__init__(f"cannot read the image {self.path!r}: {self.why}")

    def __reduce__(self) -> tuple[type["BadImageError"], tuple[str, str]]:
        return BadImageError, (self.path, self.why)


class _StrictDecoding:
    """Make PIL's size limit an error, and silence its remarks on odd metadata.

    Python's warning filters belong to the whole process: of several threads that decode at once
    the first sets them and the last puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._former: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._former = warnings.catch_warnings()
                self._former.__enter__()
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                assert self._former is not None
                self._former.__exit__(None, None, None)


_strict_decoding = _StrictDecoding()
_clear: list[str] = []  # the first image with transparent parts, for the remark about them
_told: list[str] = []


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that can be read here."""
    Image.init()
    # Its remarks on TIFFs that tifffile reads, and on damaged ones, would go to stderr.
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def endings() -> frozenset[str]:
    """Endings of image files, lower case, with the dot; also of formats that are not read here.

    So that an image is named as unreadable instead of being passed over.
    """
    known = {*formats(), "MPO"}
    found = {ending for ending, name in Image.registered_extensions().items() if name in known}
    return frozenset(found) | _OPTIONAL_ENDINGS | {NPY}


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """`PIL.Image.open` with the decoders of `FORMATS` alone: the only place that calls it."""
    return Image.open(file, formats=formats())


def _reason(error: BaseException, data: bytes = b"") -> str:
    if isinstance(error, UnidentifiedImageError):
        brand = _BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
        if brand is not None and brand not in formats():
            return f"{brand} needs {_READERS[brand]}"
        return "not an image in a format that is read (such as JPEG, PNG, WebP, TIFF)"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS:,} (a decompression "
            "bomb?); make it smaller"
        )
    return str(error) or type(error).__name__


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read() if size <= most_bytes() + _HEADER_BYTES else None
    except OSError as error:
        raise BadImageError(path, _reason(error)) from error
    if data is None:
        raise BadImageError(path, f"a file of {size:,} bytes is larger than any image may be")
    if not data:
        raise BadImageError(path, "the file is empty")
    return data


def _decode(path: str | os.PathLike[str], channels: int, decoder: Decoder, depth: Depth) -> Picture:
    """`load_image` without the guard around PIL's warnings."""
    return _decode_bytes(_read_bytes(path), path, channels, decoder, depth)


def _decode_bytes(
    data: bytes, path: str | os.PathLike[str], channels: int, decoder: Decoder, depth: Depth
) -> Picture:
    name, picture = repr(os.fspath(path)), is_picture(channels, depth)

    def taken(stored: Stored) -> Picture:
        array, clear = fitted(stored, channels, depth)
        if clear:
            _note_clear(name)
        if picture:
            return as_picture(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def decoded(content: bytes) -> Picture:
        if content.startswith(NPY_MAGIC):
            return taken(read_npy(content))
        try:
            opened = open_image(io.BytesIO(content))
        except UnidentifiedImageError:
            if content.startswith(TIFF_MAGICS):
                return taken(read_tiff(content))
            raise
        with opened as image:
            if is_for_tifffile(image, name, bits=not picture):
                return taken(read_tiff(content))
            if not picture:
                return taken(of_picture(image, lambda: open_image(io.BytesIO(content)), channels))
            pixels = turbo_pixels(image, content, os.fspath(path)) if decoder == "turbo" else None
            if pixels is None:
                image.load()
                pixels = image
            return to_mode(upright(pixels), channels, name)

    try:
        return decoded(data)
    except _DECODER_ERRORS as error:
        if (bare := without_metadata(data)) is not None:
            with contextlib.suppress(*_DECODER_ERRORS):
                return decoded(bare)
        raise BadImageError(path, _reason(error, data)) from error


def load_image(
    path: str | os.PathLike[str], channels: int, decoder: Decoder = "pillow", depth: Depth = "8"
) -> Any:
    """Read an image file of any kind: pictures, TIFF of any number of bands, .npy.

    The EXIF orientation is applied; see `to_mode` and `senet.data.arrays.fitted` for the
    conversion. Several threads may read at once.

    Args:
        path: image file.
        channels: 1 for grey (mode L), 3 for RGB, or as many as the file has.
        decoder: "pillow", or "turbo" for torchvision's JPEG decoder (see `senet.data.decoders`);
            they differ at most in rounding, where their libjpegs do.
        depth: "8", "16" or "float", what its pixels are to be.

    Returns:
        The decoded image, independent of the file: a PIL image where it is 8-bit grey or RGB,
        otherwise a tensor (C,H,W), uint8, uint16 or float32 by `depth`.

    Raises:
        BadImageError: the file is missing, empty, no image, truncated, larger than Pillow's limit
            (`PIL.Image.MAX_IMAGE_PIXELS`; of all channels, 4 bytes for each of these), has other
            channels, or floating-point pixels that are not asked for.
        ValueError: `channels` is less than 1.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, not {channels!r}")
    with _strict_decoding:
        image = _decode(path, channels, decoder, depth)
    tell_what_was_left()
    tell_what_was_clear()
    return image


def decode_image(
    data: bytes, name: str, channels: int, decoder: Decoder = "pillow", depth: Depth = "8"
) -> Any:
    """As `load_image`, for the content of a file.

    Args:
        data: content of an image file.
        name: what an error calls it.
        channels: as for `load_image`.
        decoder: likewise.
        depth: likewise.

    Raises:
        BadImageError: as for `load_image`.
    """
    with _strict_decoding:
        image = _decode_bytes(data, name, channels, decoder, depth)
    tell_what_was_left()
    tell_what_was_clear()
    return image


def _note_clear(name: str) -> None:
    if not _clear:
        _clear.append(name)


def tell_what_was_clear() -> None:
    """Warn, once a process, that an image was not opaque: what is behind it is our choice."""
    if _clear and not _told:
        _told.append(_clear[0])
        warnings.warn(
            f"some images have transparent parts, such as {_clear[0]}: these are laid on white",
            stacklevel=3,
        )


def to_mode(image: Image.Image, channels: int, name: str = "one in memory") -> Image.Image:
    """Convert an image of any mode to 8-bit grey or RGB.

    Transparency (RGBA, LA, a palette's transparent colour) is laid on white, as on a page. 16-bit
    grey is scaled to 8 bit (65535 becomes 255), not clipped as `Image.convert` would do.

    Args:
        image: PIL image.
        channels: 1 (mode L) or 3 (RGB).
        name: what a remark on its transparency calls it.

    Raises:
        ValueError: floating-point or 32-bit pixels, whose range is unknown.
    """
    if image.mode == MODES[channels] and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise ValueError("32-bit pixels have no known range; convert it to 8 or 16 bits")
        image = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        if colours.getchannel("A").getextrema() != (255, 255):
            page = Image.new("RGBA", colours.size, "white")
            colours = Image.alpha_composite(page, colours)
            _note_clear(name)
        image = colours.convert("RGB")
    return image.convert(MODES[channels])


def read_header(file: str | os.PathLike[str] | bytes, name: str | None = None) -> Header:
    """Read the header of an image file.

    Args:
        file: its path or its content.
        name: what an error calls it; None: its path.

    Raises:
        BadImageError: the file is missing, empty or no image.
    """
    path = name or ("" if isinstance(file, bytes) else os.fspath(file))

    def whole() -> bytes:
        return file if isinstance(file, bytes) else _read_bytes(file)

    def header(stream: IO[bytes]) -> Header:
        start = stream.read(len(NPY_MAGIC))
        stream.seek(0)
        if start == NPY_MAGIC:
            return npy_header(stream)
        try:
            opened = open_image(stream)
        except UnidentifiedImageError:
            if start.startswith(TIFF_MAGICS):
                return tiff_header(whole())
            raise
        with opened as image:
            if is_for_tifffile(image, repr(path), bits=True):
                return tiff_header(whole())
            deep = image.mode.startswith("I") or deep_png(image)
            depth: Depth = "float" if image.mode == "F" else "16" if deep else "8"
            channels = 1 if image.mode in GREY_MODES else 4 if image.mode == "RGBX" else 3
            return Header(channels, depth, image.size)

    with _strict_decoding:
        try:
            if isinstance(file, bytes):
                return header(io.BytesIO(file))
            with Path(file).open("rb") as stream:
                return header(stream)
        except _DECODER_ERRORS as error:
            data = whole()
            if (bare := without_metadata(data)) is not None:
                with contextlib.suppress(*_DECODER_ERRORS):
                    return header(io.BytesIO(bare))
            raise BadImageError(path, _reason(error, data)) from error


def displayed(image: Picture) -> Image.Image:
    """A decoded image as a picture for people, see `senet.data.arrays.shown`."""
    return shown(image.numpy()) if isinstance(image, Tensor) else image


class ImageSource(Protocol):
    """A map-style data set of (decoded image, target), targets known without decoding.

    The images are as `load_image` gives them.
    """

    targets: Tensor
    """Class of each image, (N,) int64, or its labels or numbers, (N,K) float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Target]: ...

    def subset(self, indices: Sequence[int]) -> Self:
        """The data set of these images, in this order."""
        ...


class MemoryImages(Dataset[tuple[Any, Target]]):
    """Decoded images of one size, held in memory.

    Args:
        images: (N,C,H,W) uint8, uint16 or float32.
        targets: (N,) class indices, or (N,K) labels or numbers.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        if images.ndim != 4 or images.dtype not in _DTYPES or images.shape[1] < 1:
            raise ValueError(
                f"images must be (N,C,H,W) uint8, uint16 or float32, not {tuple(images.shape)} "
                f"{images.dtype}"
            )
        if targets.shape[:1] != images.shape[:1]:
            raise ValueError(f"{len(images)} images need as many targets, not {targets.shape}")
        self.images = images.contiguous()
        self.targets = held(targets)

    @property
    def pixels(self) -> npt.NDArray[Any]:
        """The same memory as `images`, for NumPy."""
        return self.images.numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        image = self.images[index]
        plain = image.dtype == torch.uint8 and len(image) in MODES
        return (F.to_pil_image(image) if plain else image.clone()), target_at(self.targets, index)

    def subset(self, indices: Sequence[int]) -> "MemoryImages":
        """The data set of these images, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return MemoryImages(self.images[chosen], self.targets[chosen])


class FileImages(Dataset[tuple[Any, Target]]):
    """Images decoded from their files at each access.

    Args:
        paths: image files.
        targets: (N,) class indices, or (N,K) labels or numbers.
        channels: as for `load_image`.
        decoder: likewise.
        depth: likewise.

    Raises:
        BadImageError: on access, names the file that cannot be read.
        ValueError: the numbers of paths and targets differ.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Tensor,
        channels: int,
        decoder: Decoder = "pillow",
        depth: Depth = "8",
    ) -> None:
        if targets.shape[:1] != (len(paths),):
            raise ValueError(f"{len(paths)} paths need as many targets, not {targets.shape}")
        # One array instead of a list: forked workers do not copy it by counting references.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.targets = held(targets)
        self.channels = channels
        self.decoder = decoder
        self.depth = depth

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        image = load_image(self.path(index), self.channels, self.decoder, self.depth)
        return image, target_at(self.targets, index)

    def path(self, index: int) -> str:
        """The file of an image."""
        return os.fsdecode(bytes(self._paths[index]))

    def subset(self, indices: Sequence[int]) -> "FileImages":
        """The data set of these images, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        paths = [self.path(index) for index in indices]
        return FileImages(paths, self.targets[chosen], self.channels, self.decoder, self.depth)


def read_all(
    paths: Sequence[str],
    channels: int,
    *,
    memory_limit: int,
    decoder: Decoder = "pillow",
    depth: Depth = "8",
) -> tuple[Tensor | None, dict[int, BadImageError]]:
    """Decode every file once: find the bad ones, and keep the good ones if they are small.

    Args:
        paths: image files.
        memory_limit: bytes of decoded pixels that may be kept.
        channels: as for `load_image`.
        decoder: likewise.
        depth: likewise.

    Returns:
        The readable images, (N - bad,C,H,W) of the dtype that `depth` says, in the order of
        `paths`, or None where they differ in size or exceed the limit; and the error of each bad
        file by its index.
    """
    bad: dict[int, BadImageError] = {}
    kept: npt.NDArray[Any] | None = None
    keep, n = True, 0
    with _strict_decoding:
        for index, path in enumerate(paths):
            try:
                image = _decode(path, channels, decoder, depth)
            except BadImageError as error:
                bad[index] = error
                continue
            if not keep:
                continue
            pixels = np.asarray(image)
            if kept is None:
                keep = len(paths) * pixels.nbytes <= memory_limit
                kept = np.empty((len(paths), *pixels.shape), pixels.dtype) if keep else None
            if kept is not None:
                keep = pixels.shape == kept.shape[1:]
                if keep:
                    kept[n] = pixels
                    n += 1
    tell_what_was_left()
    tell_what_was_clear()
    if kept is None or not keep:
        return None, bad
    images = torch.from_numpy(kept[:n])
    if is_picture(channels, depth):  # (N,H,W) or (N,H,W,3)
        images = images.reshape(*images.shape[:3], channels).permute(0, 3, 1, 2)
    return images.contiguous(), bad
