"""Opening data sets by name and by folder, and each complaint about them."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from tiny_images import picture, truncate

from senet.data import BadImageError, FileImages, MemoryImages, load_data
from senet.data.sources import files
from senet.data.sources.embedded import read_embedded
from senet.errors import SenetError, UserError

MakeFolder = Callable[..., Path]
TWO_BY_TWO = {"train": {"cat": 3, "dog": 4}, "val": {"cat": 2, "dog": 1}}


def refused(message: str, data: str | Path, **options: Any) -> str:
    """The one line with which `load_data` refuses; `message` is a pattern."""
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(data), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["val", "test"])
def test_folder_with_a_split(make_folder: MakeFolder, name: str) -> None:
    folder = make_folder({"train": TWO_BY_TWO["train"], name: TWO_BY_TWO["val"]})
    (folder / "train" / ".cache").mkdir()
    data = load_data(str(folder))
    assert (data.name, data.classes, data.skipped) == (str(folder), ("cat", "dog"), ())
    assert data.train.targets.tolist() == [0] * 3 + [1] * 4
    assert data.val.targets.tolist() == [0] * 2 + [1]
    image, label = data.train[3]
    assert (image.mode, label) == ("RGB", 1)
    assert np.array_equal(np.asarray(image), np.asarray(picture(4)))


def test_small_square_images_are_taken_whole(make_folder: MakeFolder) -> None:
    data = load_data(str(make_folder(TWO_BY_TWO)))
    assert isinstance(data.train, MemoryImages)
    assert (data.preprocessing.image_size, data.preprocessing.resize) == (8, 8)
    assert data.preprocessing.mean == (0.485, 0.456, 0.406)
    larger = load_data(data.name, image_size=96).preprocessing
    assert (larger.image_size, larger.resize) == (96, 110)


def test_images_of_many_sizes_get_imagenets_preprocessing(make_folder: MakeFolder) -> None:
    data = load_data(str(make_folder(TWO_BY_TWO, size=lambda seed: (8 + seed, 9))))
    assert isinstance(data.train, FileImages)
    assert (data.preprocessing.image_size, data.preprocessing.resize) == (224, 256)
    assert data.train[2][0].size == (11, 9)


def test_a_grey_folder_stays_grey(make_folder: MakeFolder) -> None:
    data = load_data(str(make_folder(TWO_BY_TWO, mode="L")))
    assert data.preprocessing.channels == 1
    assert data.train[0][0].mode == "L"
    assert data.preprocessing.mean == pytest.approx((0.449,), abs=1e-6)


def test_one_coloured_image_makes_it_colour(make_folder: MakeFolder) -> None:
    folder = make_folder(TWO_BY_TWO, mode="L")
    picture(0).save(folder / "train" / "dog" / "002.png")
    assert load_data(str(folder)).preprocessing.channels == 3


@pytest.mark.parametrize("inside", ["", "train"])
def test_val_fraction_is_stratified_and_seeded(make_folder: MakeFolder, inside: str) -> None:
    folder = make_folder({inside: {"few": 2, "many": 20}})

    def pixels(source: Any) -> list[bytes]:
        return [source[i][0].tobytes() for i in range(len(source))]

    data = load_data(str(folder), val_fraction=0.2, seed=1)
    assert torch.bincount(data.val.targets).tolist() == [1, 4]
    assert torch.bincount(data.train.targets).tolist() == [1, 16]
    whole = {picture(i).tobytes() for i in range(1, 23)}
    assert {*pixels(data.train), *pixels(data.val)} == whole
    assert not {*pixels(data.train)} & {*pixels(data.val)}
    again = load_data(str(folder), val_fraction=0.2, seed=1)
    assert pixels(again.val) == pixels(data.val)
    assert pixels(again.train) == pixels(data.train)
    assert pixels(load_data(str(folder), val_fraction=0.2, seed=2).val) != pixels(data.val)


def test_unknown_data_set() -> None:
    refused(r"unknown data set 'cifar11'.*did you mean 'cifar10'\?.*known: embedded,", "cifar11")
    assert "did you mean" not in refused("unknown data set", "/no/such/folder")


def test_empty_folder(tmp_path: Path) -> None:
    refused(f"{re.escape(str(tmp_path))} has no class folders", tmp_path, val_fraction=0.1)
    refused("has no class folders", tmp_path)


def test_class_without_images(make_folder: MakeFolder) -> None:
    folder = make_folder(TWO_BY_TWO)
    empty = folder / "train" / "bird"
    empty.mkdir()
    (empty / "readme.txt").write_text("no image")
    refused("class 'bird' without readable images in .*train", folder)


def test_train_and_val_classes_differ(make_folder: MakeFolder) -> None:
    folder = make_folder({"train": {"cat": 1, "dog": 1}, "val": {"cat": 1, "fox": 1}})
    refused(r"classes differ: 'fox' only in .*val, .*no others than 'cat', 'dog'", folder)


def test_many_missing_classes_stay_one_short_line(make_folder: MakeFolder) -> None:
    folder = make_folder({"train": {f"c{i}": 1 for i in range(9)}, "val": {"c0": 1}})
    with pytest.warns(UserWarning, match="'c1', 'c2', 'c3', 'c4', 'c5' and 3 more has no") as told:
        load_data(str(folder))
    assert len(told) == 1


def test_folder_layout_errors(make_folder: MakeFolder) -> None:
    folder = make_folder({"train": {"a": 1, "b": 3}})
    refused("--val-fraction", folder)
    refused("class 'a' has only 1 image", folder, val_fraction=0.5)
    refused("val_fraction must be between 0 and 1, not 1.0", folder, val_fraction=1.0)
    refused("nothing to download", folder, download=True)
    (folder / "train").rename(folder / "val")
    refused("has val/ but no train/", folder)


def test_val_fraction_with_a_split_is_refused(make_folder: MakeFolder) -> None:
    refused("has val/: leave out val_fraction 0.1", make_folder(TWO_BY_TWO), val_fraction=0.1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_truncated_jpeg_in_a_small_folder_is_found_at_once(
    make_folder: MakeFolder, split: str
) -> None:
    folder = make_folder(TWO_BY_TWO, suffix=".jpg")
    truncate(folder / split / "dog" / "000.jpg")
    with pytest.raises(BadImageError, match=rf"(?i){split}/dog/000\.jpg.*truncated"):
        load_data(str(folder))


def test_truncated_jpeg_in_a_large_folder_is_named_on_access(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(
        {"train": {"cat": 200, "dog": 1}, "val": {"cat": 1, "dog": 1}}, suffix=".jpg"
    )
    truncate(folder / "train" / "cat" / "001.jpg")  # not among the probes for grey
    monkeypatch.setattr(files, "CHECKED_LIMIT", 1000)
    data = load_data(str(folder))
    assert isinstance(data.train, FileImages)
    assert data.train[0][0].size == (8, 8)
    with pytest.raises(BadImageError, match=r"(?i)train/cat/001\.jpg.*truncated"):
        data.train[1]


@pytest.mark.parametrize("sizes", ["equal", "mixed"])
def test_bad_images_are_skipped_and_listed(make_folder: MakeFolder, sizes: str) -> None:
    size = (lambda _: (8, 8)) if sizes == "equal" else (lambda seed: (8 + seed, 8))
    folder = make_folder(TWO_BY_TWO, suffix=".jpg", size=size)
    truncate(folder / "train" / "dog" / "001.jpg")
    (folder / "train" / "cat" / "000.jpg").write_bytes(b"")
    truncate(folder / "val" / "cat" / "001.jpg")
    data = load_data(str(folder), skip_bad_images=True)
    assert isinstance(data.train, MemoryImages if sizes == "equal" else FileImages)
    assert data.train.targets.tolist() == [0] * 2 + [1] * 3
    assert data.val.targets.tolist() == [0, 1]
    assert len(data.skipped) == 3
    assert all("\n" not in line for line in data.skipped)
    for line, part in zip(
        data.skipped, ["cat/000.jpg': the file is empty", "dog/001.jpg", "val/cat"], strict=True
    ):
        assert part in line
    for i in range(len(data.train)):
        assert data.train[i][1] == data.train.targets[i]


def test_a_class_of_bad_images_only(make_folder: MakeFolder) -> None:
    folder = make_folder(TWO_BY_TWO, suffix=".jpg")
    truncate(folder / "val" / "dog" / "000.jpg")
    refused("class 'dog' without readable images in .*val", folder, skip_bad_images=True)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "imagenet", "places365"])
def test_a_missing_data_set_says_what_to_put_where(tmp_path: Path, name: str) -> None:
    expected = {
        "cifar10": "cifar-10-batches-py",
        "cifar100": "cifar-100-python",
        "fashion-mnist": "FashionMNIST/raw: put train-images-idx3-ubyte",
        "imagenet": "imagenet: put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar",
        "places365": "places365: put categories_places365.txt",
    }[name]
    line = refused(f"{name} is missing or incomplete in {tmp_path}", name, root=tmp_path)
    assert expected in line
    assert ("--download" in line) == (name != "imagenet")
    assert list(tmp_path.iterdir()) == []


def test_unpacking_imagenet_needs_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy", None)
    refused("imagenet needs scipy: pip install scipy", "imagenet", root=tmp_path)


def test_imagenet_cannot_be_downloaded(tmp_path: Path) -> None:
    refused(
        r"imagenet cannot be downloaded: put ILSVRC.* into",
        "imagenet",
        root=tmp_path,
        download=True,
    )


class NoNetwork(torchvision.datasets.CIFAR10):
    def download(self) -> None:
        raise OSError("no route to host")


def test_a_failed_download_is_not_the_users_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", NoNetwork)
    with pytest.raises(
        SenetError, match=r"cannot download cifar10 to .*no route to host"
    ) as caught:
        load_data("cifar10", root=tmp_path, download=True)
    assert not isinstance(caught.value, UserError)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def test_fashion_mnist_through_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    train, test = read_embedded()
    for split, source in (("train", train), ("t10k", test)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(source.images[:50, 0].numpy()))
        labels = source.targets[:50].to(torch.uint8).numpy()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    data = load_data("fashion-mnist", root=tmp_path)
    assert isinstance(data.train, MemoryImages)
    assert torch.equal(data.train.images, train.images[:50])
    assert data.val.targets.tolist() == test.targets[:50].tolist()
    assert data.classes[9] == "Ankle boot"
    assert (data.preprocessing.image_size, data.preprocessing.channels) == (28, 1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

    class Cifar:
        """What torchvision's class offers once its files are read."""

        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            assert (root, download) == (tmp_path, False)
            self.data = pixels if train else pixels[:2]
            self.targets = [0, 1, 1, 0] if train else [1, 0]
            self.classes = ["apple", "bear"]

    monkeypatch.setattr(torchvision.datasets, name.upper(), Cifar)
    data = load_data(name, root=tmp_path)
    assert np.array_equal(np.asarray(data.train[2][0]), pixels[2])
    assert (data.train[2][1], len(data.val), data.classes) == (1, 2, ("apple", "bear"))
    assert (data.preprocessing.image_size, data.preprocessing.resize) == (32, 32)


def test_imagenet_through_torchvision(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    wnids = ["n01440764", "n01443537"]
    for split in ("train", "val"):
        for i, wnid in enumerate(wnids):
            (root / split / wnid).mkdir(parents=True)
            picture(i, (20, 30)).save(root / split / wnid / "a.JPEG")
    names = {wnids[0]: ("tench", "Tinca tinca"), wnids[1]: ("goldfish",)}
    torch.save((names, []), root / "meta.bin")
    data = load_data("imagenet", root=tmp_path)
    assert data.classes == ("tench, Tinca tinca", "goldfish")
    assert (data.train[1][0].size, data.train[1][1]) == ((20, 30), 1)
    assert (data.preprocessing.image_size, data.preprocessing.resize) == (224, 256)
    (root / "train" / wnids[0] / "a.JPEG").unlink()
    refused("imagenet is missing or incomplete", "imagenet", root=tmp_path)


def test_places365_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = torchvision.datasets.Places365
    monkeypatch.setattr(places, "_check_integrity", lambda *_: True)  # the lists below are short
    root = tmp_path / "places365"
    (root / "data_256_standard" / "a").mkdir(parents=True)
    (root / "val_256").mkdir()
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/b/bakery 1\n")
    (root / "places365_train_standard.txt").write_text("/a/1.jpg 1\n")
    (root / "places365_val.txt").write_text("2.jpg 0\n")
    picture(1).save(root / "data_256_standard" / "a" / "1.jpg")
    picture(2).save(root / "val_256" / "2.jpg")
    data = load_data("places365", root=tmp_path)
    assert data.classes == ("/a/airfield", "/b/bakery")
    assert (data.train[0][1], data.val[0][1]) == (1, 0)


@pytest.mark.parametrize("options", [{"val_fraction": 0.1}, {"skip_bad_images": True}])
def test_options_without_use_are_refused(options: dict[str, Any]) -> None:
    refused(r"split of its own|is for folders", "cifar10", **options)
