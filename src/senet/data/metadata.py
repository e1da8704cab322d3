"""What a file says beside its pixels: the orientation is used, and nothing spoils an image."""

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_XMP = b"XML:com.adobe.xmp\0\0"  # uncompressed; Pillow finds an orientation in it too
_TEXT_LIMIT = 2**20  # bytes of text in a PNG that Pillow takes


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; as it is where that says nothing that makes sense.

    `PIL.ImageOps.exif_transpose` also writes the other entries anew, and fails at odd ones.
    """
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (
        OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError,
        AttributeError, struct.error, zlib.error,
    ):  # fmt: skip
        return image  # no EXIF that Pillow can read
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG without what is neither pixels nor orientation; None of another format.

    For a file that Pillow refuses, whose limits hold for texts and colour profiles as well.

    Args:
        data: content of the file; may be damaged.
    """
    if data.startswith(_PNG):
        return _PNG + b"".join(_png_parts(data))
    if data.startswith(_JPEG):
        return _JPEG + b"".join(_jpeg_parts(data))
    return None


def _png_parts(data: bytes) -> Iterator[bytes]:
    place = len(_PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        part = data[place : place + 12 + length]
        xmp = kind == b"iTXt" and part[8:].startswith(_XMP) and length < _TEXT_LIMIT
        if kind not in _TEXT or xmp:
            yield part
        place += 12 + length


def _jpeg_parts(data: bytes) -> Iterator[bytes]:
    """The segments up to the first scan, but for APPn and comments, and all behind them."""
    place = len(_JPEG)
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if length < 2:
            break
        part = data[place : place + 2 + length]
        exif, adobe = marker == 0xE1, marker == 0xEE and length >= 14  # what its colours mean
        if exif or adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield part
        place += 2 + length
    yield data[place:]
