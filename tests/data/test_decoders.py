"""Pillow's pixels and torchvision's: alike in every kind of file, and so are the errors."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from tiny_images import picture, truncate

from senet.data import (
    Augmentation,
    BadImageError,
    FileImages,
    MemoryImages,
    check_decoder,
    decoders,
    load_data,
    load_image,
    train_loader,
)
from senet.data.images import decode_image
from senet.data.sources import files
from senet.errors import UserError

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each test begins without a remark made; gives the images that were left to Pillow."""
    monkeypatch.setattr(decoders, "_left", left := [])
    monkeypatch.setattr(decoders, "_told", [])
    return left


def smooth(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Random colours without hard edges, as in photos."""
    return picture(seed, (5, 4)).resize(size, Image.Resampling.BICUBIC).convert(mode)


def both(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    read = [load_image(path, channels, decoder) for decoder in ("pillow", "turbo")]
    assert read[0].mode == read[1].mode
    return np.asarray(read[0]).astype(int), np.asarray(read[1]).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "options",
    [{"quality": 90}, {"quality": 50, "progressive": True}, {"quality": 95, "subsampling": 0}],
)
def test_pixels_are_close(
    tmp_path: Path,
    options: dict[str, object],
    mode: str,
    channels: int,
    told: list[str],
) -> None:
    path = tmp_path / "image.jpg"
    smooth(0, (67, 45), mode).save(path, **options)
    pillow, turbo = both(path, channels)
    assert pillow.shape == turbo.shape
    assert pillow.std() > 20
    assert np.abs(pillow - turbo).max() <= 3  # two libjpegs may round differently
    assert not told  # torchvision did it


def test_torchvision_is_really_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    smooth(0, (8, 8)).save(path)
    white = torch.full((8, 8, 3), 255, dtype=torch.uint8)
    monkeypatch.setattr(decoders, "_torchvision", lambda data: white)
    assert load_image(path, 3, "turbo").getextrema() == ((255, 255),) * 3
    assert load_image(path, 3).getextrema() != ((255, 255),) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_alike(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(1, (40, 24)).save(tmp_path / "turned.jpg", exif=exif)
    pillow, turbo = both(tmp_path / "turned.jpg", 3)
    assert pillow.shape == turbo.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert np.abs(pillow - turbo).max() <= 3


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("print.jpg", lambda p: smooth(2, (20, 10), "CMYK").save(p)),
        ("plain.png", lambda p: smooth(2, (20, 10)).save(p)),
        ("palette.png", lambda p: smooth(2, (20, 10), "P").save(p)),
        ("clear.png", lambda p: smooth(2, (20, 10), "RGBA").save(p)),
        ("hole.png", lambda p: smooth(2, (20, 10)).save(p, transparency=(1, 2, 3))),
        ("bits.png", lambda p: smooth(2, (20, 10), "1").save(p)),
        ("deep.png", lambda p: Image.new("I;16", (20, 10), 5000).save(p)),
        ("web.webp", lambda p: smooth(2, (20, 10)).save(p)),
    ],
)
def test_what_torchvision_does_not_take_is_left_to_pillow_and_said_once(
    tmp_path: Path, name: str, save: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    save(path)
    with pytest.warns(UserWarning, match=f"Pillow decodes the others, such as .*{name}") as caught:
        pillow, turbo = both(path, 3)
    assert np.array_equal(pillow, turbo)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(path, 3, "turbo")


def error_of(read: Callable[[], object]) -> str:
    with pytest.raises(BadImageError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])  # a PNG is not given to torchvision
def test_errors_are_alike(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / f"whole{suffix}"
    smooth(3, (64, 64)).save(whole)
    truncated = tmp_path / f"half{suffix}"
    truncated.write_bytes(whole.read_bytes())
    truncate(truncated)
    empty, text = tmp_path / f"empty{suffix}", tmp_path / f"text{suffix}"
    empty.touch()
    text.write_bytes(b"no image at all " * 9)
    for path in (truncated, empty, text, tmp_path / "absent.jpg"):
        pillow, turbo = (
            error_of(lambda p=path, d=d: load_image(p, 3, d)) for d in ("pillow", "turbo")
        )
        assert pillow == turbo
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    asked: list[bytes] = []
    monkeypatch.setattr(decoders, "_torchvision", lambda data: asked.append(data))
    assert "limit of 4,095" in error_of(lambda: load_image(whole, 3, "turbo"))
    assert not asked  # no memory is taken for a bomb


def test_any_bytes_give_an_image_or_one_line() -> None:
    """Damaged files; torchvision's PNG decoder, which crashes at some, must not be asked."""
    for form in ("jpeg", "png"):
        file = io.BytesIO()
        smooth(4, (24, 24)).save(file, form)
        content = file.getvalue()
        rng = np.random.default_rng(0)
        outcomes = set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(300):
                damaged = bytearray(content)
                for place in rng.integers(0, len(content), 3):
                    damaged[place] = rng.integers(0, 256)
                try:
                    assert decode_image(bytes(damaged), "it", 3, "turbo").mode == "RGB"
                    outcomes.add("image")
                except BadImageError as error:
                    outcomes.add("error" if "\n" not in str(error) else "lines")
        assert outcomes <= {"image", "error"}
        assert "error" in outcomes


def test_all_sources_take_it(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder({"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}}, suffix=".jpg")
    asked: list[bytes] = []
    real = decoders._torchvision

    def counted(data: bytes) -> torch.Tensor:
        asked.append(data)
        return real(data)

    monkeypatch.setattr(decoders, "_torchvision", counted)
    data = load_data(str(folder), decode="turbo")
    assert isinstance(data.train, MemoryImages)
    assert len(asked) == 1 + 8  # the check, and every image
    monkeypatch.setattr(files, "CHECKED_LIMIT", 0)
    data = load_data(str(folder), decode="turbo", image_size=8)
    assert isinstance(data.train, FileImages)
    asked.clear()
    data.train.subset([1])[0]
    assert len(asked) == 1
    plain = load_data(str(folder), image_size=8)
    batches = [
        list(train_loader(d, Augmentation(), batch_size=2, seed=0, num_workers=0))
        for d in (data, plain)
    ]
    for (ours, labels), (theirs, same) in zip(*batches, strict=True):
        assert torch.equal(labels, same)
        assert (ours - theirs).abs().max() < 0.1


def test_it_must_be_known_and_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="decode must be one of pillow, turbo, got 'dali'"):
        check_decoder("dali")
    with pytest.raises(UserError, match="decode is for image files, embedded comes as pixels"):
        load_data("embedded", decode="turbo")

    def gone(*_: object) -> None:
        raise RuntimeError("No such operator image::decode_jpeg")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", gone)
    with pytest.raises(UserError, match=r"torchvision 0\.\d+.* cannot decode JPEG here \(No such"):
        load_data("anything", decode="turbo")
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    with pytest.raises(UserError, match="cannot decode JPEG here"):
        check_decoder("turbo")
