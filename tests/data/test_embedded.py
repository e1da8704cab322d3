"""The embedded data set is what it says, and notices when it is not."""

import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from senet.data import MemoryImages, load_data
from senet.data.sources.embedded import CLASSES, MEAN, STD, read_embedded
from senet.errors import SenetError, UserError

FOLDER = Path(str(files("senet.data.sources") / "fashion_mnist"))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "fashion_mnist"))


def test_balanced_and_complete() -> None:
    train, test = read_embedded()
    assert train.images.shape == (10_000, 1, 28, 28)
    assert test.images.shape == (2_000, 1, 28, 28)
    assert torch.bincount(train.targets).tolist() == [1000] * 10
    assert torch.bincount(test.targets).tolist() == [200] * 10
    assert len(CLASSES) == 10
    # No test image is among the training images, and none is blank.
    rows = {row.numpy().tobytes() for row in train.images}
    assert not any(row.numpy().tobytes() in rows for row in test.images)
    assert int(train.images.flatten(1).amax(1).min()) > 0


def test_stated_mean_and_standard_deviation() -> None:
    pixels = read_embedded()[0].images.double() / 255
    assert pixels.mean().item() == pytest.approx(MEAN, abs=5e-7)
    assert pixels.std(correction=0).item() == pytest.approx(STD, abs=5e-7)


def test_small_and_with_its_notice() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000
    notice = (FOLDER / "NOTICE").read_text()
    assert "Zalando SE" in notice
    assert "The above copyright notice and this permission notice" in " ".join(notice.split())


def test_load_data() -> None:
    data = load_data("embedded")
    assert isinstance(data.train, MemoryImages)
    assert data.classes == CLASSES
    assert data.skipped == ()
    assert data.preprocessing.image_size == data.preprocessing.resize == 28
    assert (data.preprocessing.mean, data.preprocessing.std) == ((MEAN,), (STD,))
    image, label = data.train[0]
    assert (image.mode, image.size, type(label)) == ("L", (28, 28), int)
    assert load_data("embedded", image_size=32).preprocessing.resize == 32


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.xz", "t10k-labels-idx1-ubyte.xz"])
def test_a_changed_byte_is_noticed(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(SenetError, match=rf"damaged.*{name}.*SHA-256.*reinstall") as caught:
        read_embedded(copied)
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("name", ["SHA256SUMS", "t10k-images-idx3-ubyte.xz"])
def test_a_missing_file_is_noticed(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(SenetError, match=rf"incomplete.*{name}.*reinstall"):
        read_embedded(copied)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.1}, "split of its own.*0.1"),
        ({"skip_bad_images": True}, "skip_bad_images is for folders"),
        ({"download": True}, "nothing to download"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, not 0"),
    ],
)
def test_options_without_use_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data("embedded", **options)
