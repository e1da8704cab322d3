"""Images of other channels and depths: TIFF of many bands, 16-bit PNG, .npy; read as they are."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image

from senet.data import Augmentation, BadImageError, Preprocessing, load_data, load_image
from senet.data.arrays import shown
from senet.data.images import decode_image, read_header
from senet.data.loaders import train_loader, val_loader
from senet.data.statistics import measure
from senet.data.transforms import training_transform
from senet.errors import UserError

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 65536, (6, 7, 5)).astype(np.uint16)  # (H,W,C)
FIRST = np.ascontiguousarray(BANDS.transpose(2, 0, 1))


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def npy(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def png16(pixels: NDArray[np.uint16]) -> bytes:
    """16-bit RGB or RGBA, which Pillow does not write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\1" + _left(row.astype(">u2").tobytes(), 2 * channels) for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    colour = {3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _left(row: bytes, step: int) -> bytes:
    """PNG's filter 1: differences to the pixel on the left."""
    values = np.frombuffer(bytes(step) + row, np.uint8)
    return (values[step:] - values[:-step]).tobytes()


FORMS: dict[str, Callable[[], bytes]] = {
    "interleaved": lambda: tiff(BANDS, photometric="minisblack", planarconfig="contig"),
    "planar": lambda: tiff(FIRST, photometric="minisblack", planarconfig="separate"),
    "deflated": lambda: tiff(
        BANDS, photometric="minisblack", planarconfig="contig", compression="zlib", predictor=True
    ),
    "pages": lambda: tiff(FIRST, photometric="minisblack"),
    "ImageJ": lambda: tiff(FIRST, imagej=True, metadata={"axes": "CYX"}),
    "npy, channels last": lambda: npy(BANDS),
    "npy, channels first": lambda: npy(FIRST),
    "npy, columns first": lambda: npy(np.asfortranarray(BANDS)),
    "npy, big-endian": lambda: npy(BANDS.astype(">u2")),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_bands_and_bits_are_read(form: str) -> None:
    content = FORMS[form]()
    assert read_header(content, form) == (5, "16", (7, 6))
    assert (decode_image(content, form, 5, depth="16").numpy() == FIRST).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_png_of_16_bit_colours(channels: int) -> None:
    pixels = BANDS[..., :channels].copy()
    content = png16(pixels)
    assert read_header(content, "x") == (3, "16", (7, 6))
    read = decode_image(content, "x", channels, depth="16")
    assert (read.numpy() == pixels.transpose(2, 0, 1)).all()


def test_floats_are_taken_as_they_are() -> None:
    pixels = RNG.normal(0, 100, (6, 7, 2))
    for content in (npy(pixels), tiff(pixels.astype(np.float32), photometric="minisblack")):
        assert read_header(content, "x").depth == "float"
    read = decode_image(npy(pixels), "x", 2, depth="float")
    assert (read.numpy() == pixels.astype(np.float32).transpose(2, 0, 1)).all()


def test_rgba_is_transparency_unless_four_channels_are_asked_for(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [9, 8, 7, 0]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png").channels == 3
    assert (load_image(tmp_path / "a.png", 4).numpy() == pixels.transpose(2, 0, 1)).all()
    deep = png16(pixels.astype(np.uint16) * 257)
    with pytest.warns(UserWarning, match="laid on white"):
        decode_image(deep, "x", 3, depth="16")
    laid = decode_image(deep, "x", 3, depth="16")
    assert laid.flatten(1).T.tolist() == [[65535, 0, 0], [65535, 65535, 65535]]
    assert decode_image(deep, "x", 1, depth="16").tolist() == [[[19595, 65535]]]


def test_depths_are_scaled_to_each_other_and_grey_to_colours() -> None:
    grey = np.array([[0, 300, 65535]], np.uint16)
    assert np.asarray(decode_image(npy(grey), "x", 1)).tolist() == [[0, 1, 255]]
    eight = npy(np.array([[0, 1, 255]], np.uint8))
    assert decode_image(eight, "x", 3, depth="16")[1].tolist() == [[0, 257, 65535]]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (npy(BANDS.astype(np.int16)), "int16 pixels have no known range: store uint8, uint16"),
        (npy(np.array([[None, 1]], dtype=object)), "no known range"),
        (npy(BANDS)[:-3], "cut short"),
        (npy(BANDS)[:40], ""),
        (npy(BANDS[None]), "is no image"),
        (npy(BANDS), "it has 5 channels, where 4 are needed"),
        (npy(np.zeros((2, 2, 4))), "floating-point pixels, where 16-bit pixels are needed"),
        (FORMS["interleaved"]()[:200], ""),
        (tiff(BANDS, photometric="minisblack", planarconfig="contig", compression="lzma"), "LZMA"),
        (b"II*\0 nonsense", ""),
    ],
)
def test_what_cannot_be_read_is_named_in_a_line(content: bytes, why: str) -> None:
    with pytest.raises(BadImageError, match=rf"^cannot read the image 'x\.tif': .*{why}") as caught:
        decode_image(content, "x.tif", 4, depth="16")
    assert "\n" not in str(caught.value)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(BadImageError, match="no finite numbers"):
        decode_image(npy(np.full((2, 2), np.nan)), "x", 1, depth="float")


def test_a_header_that_promises_much_takes_no_memory() -> None:
    small = npy(np.zeros((10, 10), np.uint8))
    for shape in ("(99999, 99999)", "(9000, 9000, 500)"):
        old = b"(10, 10)"
        bomb = small.replace(old + b", }" + b" " * 20, shape.encode() + b", }", 1)
        bomb = bomb.replace(b"}", b"}" + b" " * (len(small) - len(bomb)), 1)
        assert len(bomb) == len(small)
        with pytest.raises(BadImageError, match="limit of"):
            decode_image(bomb, "x", 1)


def test_damaged_files_give_a_line_or_an_image() -> None:
    rng = np.random.default_rng(1)
    for form in ("deflated", "planar", "pages", "npy, channels last"):
        content = FORMS[form]()
        for _ in range(60):
            damaged = bytearray(content)
            for place in rng.integers(0, min(len(content), 400), 3):
                damaged[place] = rng.integers(0, 256)
            with contextlib.suppress(BadImageError):  # any other error fails
                decode_image(bytes(damaged), "x", 5, depth="16")


def folder(place: Path, contents: Callable[[int], bytes], ending: str, each: int = 4) -> Path:
    for split in ("train", "val"):
        for number, name in enumerate(("a", "b")):
            (place / split / name).mkdir(parents=True)
            for i in range(each):
                path = place / split / name / f"{i}{ending}"
                path.write_bytes(contents(number * each + i))
    return place


def bands(seed: int, side: int = 8, channels: int = 5) -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9000, (side, side, channels)).astype(np.uint16)


@pytest.mark.parametrize("side", [8, 80])  # in memory as the network takes it, and not
def test_folders_of_bands(tmp_path: Path, side: int) -> None:
    data = load_data(str(folder(tmp_path / "d", lambda i: npy(bands(i, side)), ".npy")))
    images = data.preprocessing
    assert (images.channels, images.depth) == (5, "16")
    found = measure(data)
    assert found.depth == "16"
    assert len(found.mean) == 5
    if side == 8:
        whole = np.stack([bands(i) for i in range(8)]) / 65535
        np.testing.assert_allclose(found.mean, whole.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(found.std, whole.std((0, 1, 2)), rtol=1e-5)
    batches = [x for x, _ in val_loader(data, batch_size=3, num_workers=0)]
    single = torch.stack([images.transform()(data.val[i][0]) for i in range(8)])
    assert torch.equal(torch.cat(batches), single)
    shifts = Augmentation(crop="padded", padding=1, flip=True)
    for augmentation in (shifts, Augmentation(crop="random_resized", rotation=9, jitter=4)):
        loader = train_loader(data, augmentation, batch_size=4, seed=0, num_workers=0)
        for x, _ in loader:
            assert x.shape[1] == 5
            assert x.isfinite().all()


def test_mixed_folders_are_refused_before_training(tmp_path: Path) -> None:
    mixed = folder(tmp_path / "d", lambda i: npy(bands(i, channels=4 + i % 2)), ".npy")
    with pytest.raises(UserError, match="differ in their channels, they have 4, 5"):
        load_data(str(mixed))
    with pytest.raises(BadImageError, match="it has 4 channels, where 5 are needed"):
        load_data(str(mixed), channels=5)
    assert len(load_data(str(mixed), channels=5, skip_bad_images=True).train) == 4


def test_what_changes_colours_is_refused() -> None:
    images = Preprocessing(8, 8, (0.5,) * 4, (0.2,) * 4, channels=4)
    with pytest.raises(UserError, match=r"randaugment .* 4 channels of 8 bits: .*randaugment off"):
        training_transform(Augmentation(randaugment=(2, 9)), images)
    with pytest.raises(UserError, match=r"augmix .*--policy none"):
        training_transform(Augmentation(policy="augmix"), images)
    floats = Preprocessing(8, 8, (0.5,), (0.2,), channels=1, depth="float")
    with pytest.raises(UserError, match="without a range"):
        training_transform(Augmentation(jitter=9), floats)


def test_depth_is_kept_and_left_out_of_files_of_8_bits() -> None:
    deep = Preprocessing(8, 8, (0.1,) * 5, (0.2,) * 5, channels=5, depth="16")
    assert Preprocessing.from_dict(deep.to_dict()) == deep
    assert "depth" not in Preprocessing(8, 8, (0.1,) * 3, (0.2,) * 3).to_dict()


def test_a_picture_for_people_is_stretched() -> None:
    picture = shown(np.array([[[100, 200]], [[0, 1]]], np.uint16))  # of two channels the first
    assert np.asarray(picture).tolist() == [[0, 255]]
