"""Metadata never spoil an image: large or damaged profiles, texts and EXIF are passed over."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from tiny_images import picture

from senet.data.images import decode_image, read_header
from senet.data.metadata import upright, without_metadata

PICTURE = picture(1, (6, 4))


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(*chunks: bytes, before: bool = True) -> bytes:
    """PICTURE with these chunks before or behind its pixels."""
    file = io.BytesIO()
    PICTURE.save(file, "png")
    content = file.getvalue()
    place = 33 if before else len(content) - 12
    return content[:place] + b"".join(chunks) + content[place:]


BIG = zlib.compress(bytes(3 * 2**20))
PNGS: dict[str, Callable[[bool], bytes]] = {
    "a profile of 3 MB": lambda before: png(chunk(b"iCCP", b"icc\0\0" + BIG), before=before),
    "a text of 3 MB": lambda before: png(chunk(b"zTXt", b"note\0\0" + BIG), before=before),
    "an international text": lambda before: png(
        chunk(b"iTXt", b"note\0\1\0\0\0" + BIG), before=before
    ),
    "70 MB of texts": lambda before: png(
        *[chunk(b"tEXt", b"note\0" + bytes(2**20)) for _ in range(70)], before=before
    ),
    "a damaged text": lambda before: png(chunk(b"tEXt", b"note\0x", crc=1), before=before),
    "a damaged profile": lambda before: png(chunk(b"iCCP", b"icc\0\7junk"), before=before),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("what", PNGS)
def test_texts_and_profiles_of_a_png(what: str, before: bool) -> None:
    content = PNGS[what](before)
    assert decode_image(content, "x", 3).tobytes() == PICTURE.tobytes()
    assert read_header(content) == (3, "8", PICTURE.size)


def exif(orientation: object, **others: object) -> bytes:
    entries = Image.Exif()
    entries[0x0112] = orientation
    return entries.tobytes()


def test_the_orientation_is_kept_where_the_rest_is_dropped() -> None:
    turned = chunk(b"eXIf", exif(6)[6:])
    image = decode_image(png(turned, chunk(b"zTXt", b"note\0\0" + BIG)), "x", 3)
    assert image.tobytes() == PICTURE.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation: int) -> None:
    from PIL import ImageOps

    file = io.BytesIO()
    PICTURE.save(file, "png", exif=exif(orientation))
    image = Image.open(file)
    assert upright(image).tobytes() == ImageOps.exif_transpose(image).tobytes()


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_odd_exif_spoils_nothing(form: str) -> None:
    """Hundreds of damaged EXIF blocks; each image is read, turned at most."""
    entries = Image.Exif()
    entries[0x0112], entries[0x010F], entries[0x011A] = 6, "maker", 72.0
    entries[0x8769], entries[0x8825] = {0x9003: "2020:01:01"}, {1: "N", 2: (1.0, 2.0, 3.0)}
    good, rng = entries.tobytes(), np.random.default_rng(0)
    shapes = set()
    for _ in range(300):
        bad = bytearray(good)
        for place in rng.integers(6, len(bad), 4):
            bad[place] = rng.choice([0, 255, rng.integers(256)])
        file = io.BytesIO()
        PICTURE.save(file, form, exif=bytes(bad))
        shapes.add(decode_image(file.getvalue(), "x", 3).size)
    assert shapes == {PICTURE.size, PICTURE.size[::-1]}


def test_damaged_segments_of_a_jpeg() -> None:
    """Pillow refuses a short JFIF segment and a profile cut off; the pixels are there."""
    file = io.BytesIO()
    PICTURE.save(file, "jpeg")
    whole = file.getvalue()
    wanted = decode_image(whole, "x", 3).tobytes()
    for marker, content in ((0xE0, b"JFIF\0"), (0xE2, b"ICC_PROFILE\0"), (0xED, b"Photoshop 3.0\0"),
                            (0xEE, b"Adobe\0"), (0xFE, b"")):  # fmt: skip
        segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
        damaged = whole[:2] + segment + whole[2:]
        assert decode_image(damaged, "x", 3).tobytes() == wanted
        assert decode_image(damaged, "x", 3, "turbo").size == PICTURE.size


def test_what_adobe_says_of_the_colours_stays() -> None:
    """Its segment tells here that the three channels are red, green and blue, not YCbCr."""
    file = io.BytesIO()
    PICTURE.save(file, "jpeg")
    plain = without_metadata(file.getvalue())
    assert plain is not None
    adobe = struct.pack(">BBH5sHHHB", 0xFF, 0xEE, 14, b"Adobe", 100, 0, 0, 0)
    marked = plain[:2] + adobe + plain[2:]
    assert without_metadata(marked) == marked
    assert decode_image(marked, "x", 3).tobytes() != decode_image(plain, "x", 3).tobytes()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd8\xff\xe0\0"])
def test_stumps(content: bytes) -> None:
    bare = without_metadata(content)
    assert bare is None or content.startswith(bare[:2])
