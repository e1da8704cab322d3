"""Reading image files: every mode that cameras and tools write, every way a file can be broken."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import picture, truncate

from senet.data import BadImageError, FileImages, MemoryImages, load_image, to_mode
from senet.data.images import read_all, read_header
from senet.errors import UserError

NO_IMAGE = "not an image in a format that is read (such as JPEG, PNG, WebP, TIFF)"


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", ".png"),
        ("L", ".png"),
        ("LA", ".png"),
        ("P", ".png"),
        ("RGB", ".jpg"),
        ("RGBA", ".png"),
        ("CMYK", ".jpg"),
        ("YCbCr", ".jpg"),
        ("I;16", ".png"),
        ("I;16", ".tif"),
        ("I;16B", ".tif"),
    ],
)
def test_every_mode_becomes_8_bit(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    level = 255 if mode == "1" else 128
    if mode.startswith("I;16"):
        image = Image.new(mode, (5, 4), level * 257)
    else:
        image = Image.new("L", (5, 4), level).convert(mode)
    read = load_image(saved(image, tmp_path / f"image{suffix}"), channels)
    assert (read.mode, read.size) == ({1: "L", 3: "RGB"}[channels], (5, 4))
    rounding = 1 if suffix == ".jpg" else 0
    assert np.abs(np.asarray(read).astype(int) - level).max() <= rounding


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 257, 300, 32896, 65535]], dtype=np.uint16)
    path = saved(Image.fromarray(levels), tmp_path / f"deep{suffix}")
    assert np.asarray(load_image(path, 1)).tolist() == [[0, 1, 1, 128, 255]]
    assert np.asarray(load_image(path, 3))[0, :, 1].tolist() == [0, 1, 1, 128, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    with pytest.warns(UserWarning, match=r"transparent parts, such as '.*rgba\.png'.*on white"):
        colours = np.asarray(load_image(saved(rgba, tmp_path / "rgba.png"), 3))
    assert colours.tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey_alpha = Image.new("LA", (1, 1), (0, 0))
    assert np.asarray(load_image(saved(grey_alpha, tmp_path / "la.png"), 1)).item() == 255


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    plain = np.asarray(load_image(saved(palette, tmp_path / "plain.png"), 3))
    assert plain.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    path = saved(palette, tmp_path / "see-through.png", transparency=b"\x00\xff")
    with pytest.warns(UserWarning, match="laid on white"):
        load_image(path, 3)
    assert np.asarray(load_image(path, 3)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    read = np.asarray(load_image(saved(image, tmp_path / "turned.jpg", exif=exif), 1))
    assert read.shape == (16, 8)
    assert read[:7].min() > 200
    assert read[9:].max() < 50


def test_the_result_is_independent_of_the_file(tmp_path: Path) -> None:
    path = saved(picture(0), tmp_path / "a.png")
    image = load_image(path, 3)
    path.unlink()
    assert image.getpixel((0, 0)) == picture(0).getpixel((0, 0))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (
            b"not an image at all\n" * 10,
            NO_IMAGE,
        ),
        (
            b"\x89PNG\r\n\x1a\n",
            NO_IMAGE,
        ),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "broken: image.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError) as caught:
        load_image(path, 3)
    assert str(caught.value) == f"cannot read the image {str(path)!r}: {why}"
    assert (caught.value.path, caught.value.why) == (str(path), why)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp", ".webp"])
def test_truncated_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = saved(picture(1, (64, 64)), tmp_path / f"half{suffix}")
    truncate(path)
    with pytest.raises(BadImageError, match=f"half{suffix}") as caught:
        load_image(path, 3)
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_float_pixels(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="no such file"):
        load_image(tmp_path / "absent.png", 3)
    with pytest.raises(BadImageError, match="a folder"):
        load_image(tmp_path, 3)
    path = saved(Image.new("F", (2, 2), 0.5), tmp_path / "float.tif")
    with pytest.raises(BadImageError, match=r"float\.tif.*floating-point"):
        load_image(path, 1)
    path = saved(Image.new("I", (2, 2), 70000), tmp_path / "deep.tif")
    with pytest.raises(BadImageError, match="32-bit"):
        load_image(path, 1)


@pytest.mark.parametrize("limit", [40, 20])  # beyond PIL's warning, and beyond its own error
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = saved(picture(0, (8, 8)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadImageError, match=rf"bomb\.png.*limit of {limit}"):
        load_image(path, 3)


def test_channels_are_validated(tmp_path: Path) -> None:
    path = saved(picture(0), tmp_path / "a.png")
    with pytest.raises(ValueError, match="channels must be at least 1, not 0"):
        load_image(path, 0)
    with pytest.raises(BadImageError, match="it has 3 channels, where 4 are needed"):
        load_image(path, 4)


def test_to_mode_keeps_what_is_right_already() -> None:
    image = picture(0)
    assert to_mode(image, 3) is image


def test_the_error_is_one_line_and_survives_pickling() -> None:
    error = BadImageError("a 'quoted': name.jpg", "truncated\nafter 12 bytes")
    copy = pickle.loads(pickle.dumps(error))
    for each in (error, copy):
        assert str(each) == (
            """cannot read the image "a 'quoted': name.jpg": truncated after 12 bytes"""
        )
        assert (each.path, each.why) == ("a 'quoted': name.jpg", "truncated after 12 bytes")


def test_header(tmp_path: Path) -> None:
    grey = saved(picture(0, (5, 7), mode="L"), tmp_path / "grey.png")
    assert read_header(grey) == read_header(grey.read_bytes()) == (1, "8", (5, 7))
    assert not read_header(saved(picture(0), tmp_path / "colour.png")).grey
    palette = saved(picture(0, mode="L").convert("P"), tmp_path / "palette.png")
    assert not read_header(palette).grey


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_read_all_keeps_small_images(tmp_path: Path, mode: str, channels: int) -> None:
    paths = [str(saved(picture(i, mode=mode), tmp_path / f"{i}.png")) for i in range(3)]
    images, bad = read_all(paths, channels, memory_limit=3 * 64 * channels)
    assert not bad
    assert images is not None
    files = FileImages(paths, torch.arange(3), channels)
    memory = MemoryImages(images, torch.arange(3))
    for i in range(3):
        assert memory[i][0].mode == files[i][0].mode == mode
        assert np.array_equal(np.asarray(memory[i][0]), np.asarray(files[i][0]))
        assert memory[i][1] == files[i][1] == i
    assert read_all(paths, channels, memory_limit=3 * 64 * channels - 1) == (None, {})


def test_read_all_lists_bad_files_and_gives_up_on_mixed_sizes(tmp_path: Path) -> None:
    paths = [str(saved(picture(i), tmp_path / f"{i}.png")) for i in range(4)]
    truncate(Path(paths[1]))
    images, bad = read_all(paths, 3, memory_limit=10**6)
    assert list(bad) == [1]
    assert images is not None
    assert torch.equal(images[1], torch.from_numpy(np.asarray(picture(2)).copy()).permute(2, 0, 1))
    picture(9, (9, 8)).save(paths[2])
    truncate(Path(paths[3]))
    images, bad = read_all(paths, 3, memory_limit=10**6)
    assert images is None
    assert list(bad) == [1, 3]


def test_subsets(tmp_path: Path) -> None:
    paths = [str(saved(picture(i), tmp_path / f"{i} ü.png")) for i in range(3)]
    files = FileImages(paths, torch.tensor([5, 6, 7]), 3).subset([2, 0])
    assert [files.path(i) for i in range(len(files))] == [paths[2], paths[0]]
    assert files.targets.tolist() == [7, 5]
    memory = MemoryImages(torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1), torch.arange(3))
    assert memory.subset([2, 0]).images.flatten().tolist() == [2, 0]
    assert memory.subset([2, 0]).targets.tolist() == [2, 0]


def test_sources_validate() -> None:
    with pytest.raises(ValueError, match="uint8"):
        MemoryImages(torch.zeros(2, 1, 4, 4, dtype=torch.int16), torch.zeros(2))
    with pytest.raises(ValueError, match="as many targets"):
        MemoryImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3))
    with pytest.raises(ValueError, match="as many targets"):
        FileImages(["a", "b"], torch.zeros(3), 3)
