"""Folders as people have them: names of splits, junk, links, levels, Unicode, odd bytes."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import picture
from torchvision.transforms.v2 import functional as F

from senet.data import image_files, images, load_data
from senet.data.load import check_outside
from senet.data.sources import embedded
from senet.data.walk import is_junk
from senet.errors import UserError


def fill(folder: Path, *names: str, count: int = 2, suffix: str = ".png") -> Path:
    """Some images of each class."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(number).save(folder / name / f"{number}{suffix}")
    return folder


def refused(message: str, folder: Path, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(folder), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "Validation", "test", "Test"])
def test_names_of_splits(tmp_path: Path, train: str, val: str) -> None:
    fill(tmp_path / train, "cat", "dog", count=3)
    fill(tmp_path / val, "cat", "dog")
    data = load_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (6, 4)
    refused(f"has {val}/: leave out val_fraction", tmp_path, val_fraction=0.5)


def test_which_split_is_evaluated_on(tmp_path: Path) -> None:
    for count, split in enumerate(("train", "valid", "test"), start=2):
        fill(tmp_path / split, "cat", "dog", count=count)
    assert len(load_data(str(tmp_path)).val) == 6
    sizes = [len(load_data(str(tmp_path), split=name).val) for name in ("train", "val", "test")]
    assert sizes == [4, 6, 8]
    with pytest.raises(UserError, match="split must be one of train, val, test, got 'dev'"):
        load_data(str(tmp_path), split="dev")  # type: ignore[arg-type]
    (tmp_path / "test").rename(tmp_path / "other")
    refused("has no split test, only train, valid", tmp_path, split="test")


def test_two_names_for_a_split(tmp_path: Path) -> None:
    for split in ("train", "val", "validation"):
        fill(tmp_path / split, "cat", "dog")
    refused("has both 'val' and 'validation', which mean the same", tmp_path)


def test_classes_that_are_called_like_splits(tmp_path: Path) -> None:
    fill(tmp_path / "a", "bus", "car", "train", count=4)
    assert load_data(str(tmp_path / "a"), val_fraction=0.5).classes == ("bus", "car", "train")
    fill(tmp_path / "b", "invalid", "valid", count=4)
    assert load_data(str(tmp_path / "b"), val_fraction=0.5).classes == ("invalid", "valid")
    fill(tmp_path / "c", "train", "val")
    refused(r"c/train has no class folders", tmp_path / "c", val_fraction=0.5)
    fill(tmp_path / "d" / "train", "cat", "dog", count=4)
    fill(tmp_path / "d", "test")  # without labels, as in competitions
    assert len(load_data(str(tmp_path / "d"), val_fraction=0.5).val) == 4


def test_one_folder_too_high(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "images", "cat", "dog")
    fill(tmp_path / "a" / "__MACOSX", "images")
    refused(r"a lies one level too high: give .*a/images, which holds 'cat', 'dog'", tmp_path / "a",
            val_fraction=0.5)  # fmt: skip
    for version in ("v1", "v2"):
        for split in ("train", "val"):
            fill(tmp_path / "b" / version / split, "cat", "dog")
    refused(r"give .*b/v1, which holds 'train', 'val'", tmp_path / "b", val_fraction=0.5)
    fill(tmp_path / "c", "cat")
    refused("has the class 'cat' alone, so there is nothing to tell apart", tmp_path / "c",
            val_fraction=0.5)  # fmt: skip


def test_classes_with_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, "2020", "2021")
    data = load_data(str(tmp_path), val_fraction=0.5)
    assert (data.classes, len(data.train)) == (("cat", "dog"), 4)


def test_every_ending_that_predict_reads_is_trained_on(tmp_path: Path) -> None:
    endings = [".jfif", ".gif", ".avif", ".jp2", ".tga", ".JPG", ".jpe", ".mpo", ".ppm", ".ico"]
    for number, ending in enumerate(endings):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            form = {".jfif": "jpeg", ".jpe": "jpeg"}.get(ending)
            picture(number, (32, 32)).save(tmp_path / name / f"{number}{ending}", form)
    data = load_data(str(tmp_path), val_fraction=0.5)
    assert len(data.train) + len(data.val) == 2 * len(endings)
    for kind in (".pdf", ".h5", ".mpg", ".eps", ".txt"):
        assert kind not in images.endings()


def test_a_photo_that_needs_another_package_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog", count=4)
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    (tmp_path / "cat" / "phone.HEIC").write_bytes(content)
    if "HEIF" not in images.formats():
        refused(r"phone\.HEIC': HEIF needs pip install pillow-heif", tmp_path, val_fraction=0.5)
    data = load_data(str(tmp_path), val_fraction=0.5, skip_bad_images=True)
    assert len(data.skipped) == 1


def test_pictures_that_are_not_read_are_told(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog", count=4)
    for name in ("a.psd", "b.svg", "c.SVG", "notes.txt"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"not read are left out: 2 \.svg, 1 \.psd"):
        load_data(str(tmp_path), val_fraction=0.5)


def test_junk_is_neither_image_nor_class(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "dog", count=4)
    for folder in (tmp_path, tmp_path / "cat"):
        for junk in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"):
            fill(folder, junk)
    (tmp_path / "cat" / "._1.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    data = load_data(str(tmp_path), val_fraction=0.5)
    assert (data.classes, len(data.train) + len(data.val)) == (("cat", "dog"), 8)
    assert not is_junk("cat")


def test_links_are_followed_once(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", "cat", "dog", count=4)
    fill(tmp_path / "store", "more", count=3)
    (data / "cat" / "loop").symlink_to(data / "cat", target_is_directory=True)
    (data / "cat" / "up").symlink_to(data, target_is_directory=True)
    (data / "all").symlink_to(data, target_is_directory=True)
    (data / "dog" / "a").symlink_to(tmp_path / "store" / "more", target_is_directory=True)
    (data / "dog" / "b").symlink_to(tmp_path / "store" / "more", target_is_directory=True)
    found = load_data(str(data), val_fraction=0.5)
    assert found.classes == ("cat", "dog")
    assert len(found.train) + len(found.val) == 4 + 4 + 3
    assert len(image_files(data / "cat")) == 4
    (data / "eel").symlink_to(tmp_path / "store" / "more", target_is_directory=True)
    assert load_data(str(data), val_fraction=0.5).classes == ("cat", "dog", "eel")


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "cat", "dog")
    inner, scan = tmp_path / "cat" / "more", os.scandir
    inner.mkdir()

    def scandir(path: Any) -> Any:
        if os.fspath(path) == str(inner):
            raise PermissionError(13, "Permission denied", str(inner))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(r"cannot read the folder '.*cat/more': Permission denied", tmp_path, val_fraction=0.5)


def test_a_class_missing_in_val_keeps_the_numbers_of_training(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ant", "bee", "cat", count=3)
    fill(tmp_path / "val", "ant", "cat")
    (tmp_path / "val" / "bee").mkdir()
    with pytest.warns(UserWarning, match="class 'bee' has no images in .*val"):
        data = load_data(str(tmp_path))
    assert data.val.targets.tolist() == [0, 0, 2, 2]  # type: ignore[union-attr]


def test_names_in_two_unicode_forms(tmp_path: Path) -> None:
    composed = [unicodedata.normalize("NFC", name) for name in ("é", "ü", "z")]
    fill(tmp_path / "train", *composed)
    fill(tmp_path / "val", *(unicodedata.normalize("NFD", name) for name in composed))
    data = load_data(str(tmp_path))
    assert data.classes == tuple(sorted(composed))
    assert len(data.val) == 6
    fill(tmp_path / "train", unicodedata.normalize("NFD", "é"))
    refused("two folders that are both called 'é'", tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"dog[puppy]:$"):
        folder = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118
        os.mkdir(folder)  # noqa: PTH102
        for number in range(4):
            picture(number).save(os.fsdecode(os.path.join(folder, b"%d\xff.png" % number)))  # noqa: PTH118
    data = load_data(str(tmp_path), val_fraction=0.5)
    assert data.classes == (r"caf\xe9", "dog[puppy]:$")
    assert data.train[0][0].size == (8, 8)  # type: ignore[index]
    for name in data.classes:
        name.encode()


def test_grey_is_not_decided_by_a_few(tmp_path: Path) -> None:
    """Every other image is coloured, all that a periodic probe would see is grey."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for number in range(128):
        for name in ("a", "b"):
            mode = "RGB" if number % 64 == 63 else "L"
            picture(number, mode=mode).save(tmp_path / name / f"{number:03}.png")
    assert load_data(str(tmp_path), val_fraction=0.5).preprocessing.channels == 3
    asked = load_data(str(tmp_path), val_fraction=0.5, channels=1)
    assert asked.preprocessing.channels == 1
    assert asked.train[0][0].mode == "L"  # type: ignore[index]


def test_grey_training_images_and_coloured_ones_to_evaluate(tmp_path: Path) -> None:
    fill(tmp_path / "val", "cat", "dog")
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(1, mode="L").save(tmp_path / "train" / name / "1.png")
    assert load_data(str(tmp_path)).preprocessing.channels == 3


def test_all_of_a_labelled_folder_by_the_numbers_of_a_network(tmp_path: Path) -> None:
    fill(tmp_path, "cat", "eel")
    refused("--val-fraction", tmp_path)
    data = load_data(str(tmp_path), whole=True, classes=("ant", "cat", "eel"))
    assert data.val.targets.tolist() == [1, 1, 2, 2]  # type: ignore[union-attr]
    refused("classes differ: 'eel' only in", tmp_path, whole=True, classes=("cat", "dog"))
    fill(tmp_path / "parts" / "train", "cat", "dog")
    refused("--val-fraction", tmp_path / "parts", whole=True)  # not what it was trained on
    assert len(load_data(str(tmp_path / "parts"), whole=True, split="train").val) == 4
    (tmp_path / "parts" / "train").rename(tmp_path / "parts" / "test")
    assert len(load_data(str(tmp_path / "parts"), whole=True).val) == 4


def test_splits_of_named_sets() -> None:
    assert len(load_data("embedded", split="train").val) == 10_000
    with pytest.raises(UserError, match="split must be one of train, val, test, got 'all'"):
        load_data("embedded", split="all")  # type: ignore[arg-type]


def test_grey_images_for_a_network_for_colours() -> None:
    data = load_data("embedded", channels=3)
    assert data.preprocessing.channels == len(data.preprocessing.mean) == 3
    image, _ = data.train[0]  # type: ignore[index]
    three = data.preprocessing.transform()(image)
    assert three.shape == (3, 28, 28)
    level = F.pil_to_tensor(image)[0] / 255
    for channel in three:
        assert torch.allclose(channel, (level - embedded.MEAN) / embedded.STD, atol=1e-6)


def test_a_place_to_write_to_must_not_become_data(tmp_path: Path) -> None:
    flat = fill(tmp_path / "flat", "cat", "dog")
    split = fill(tmp_path / "split" / "train", "cat", "dog").parent
    fill(split / "val", "cat", "dog")
    (tmp_path / "link").symlink_to(flat)
    (flat / "bird").symlink_to(fill(tmp_path / "birds", "red", "blue"))
    for data, out in (
        ("flat", "flat/run"), ("flat", "flat/runs/run"), ("flat", "link/run"), ("link", "flat/run"),
        ("flat", "flat/cat/run"), ("flat", "split/../flat/run"), ("flat", "birds/run"),
        ("split", "split/train/run"), ("split", "split/val/cat/run"), ("split", "split/test"),
        ("split", "split/Valid/run"), ("hf:flat", "flat/run"), ("hf-stream:split", "split/run"),
    ):  # fmt: skip
        prefix, colon, name = data.rpartition(":")
        place = f"{prefix}{colon}{tmp_path / name}"
        with pytest.raises(UserError, match="give a place outside by --out") as caught:
            check_outside(place, tmp_path / out)
        assert "\n" not in str(caught.value)
    for data, out in (
        ("flat", "run"), ("flat", "flat-run"), ("flat", "flat/.runs/run"), ("split", "split/run"),
    ):  # fmt: skip
        check_outside(str(tmp_path / data), tmp_path / out)
        fraction = 0.5 if data == "flat" else None
        before = load_data(str(tmp_path / data), val_fraction=fraction)
        fill(tmp_path / out / "figures", "more")
        after = load_data(str(tmp_path / data), val_fraction=fraction)
        assert (before.classes, len(before.train)) == (after.classes, len(after.train))
    for data in ("embedded", "hf:owner/name", "shards:https://host/x", str(tmp_path / "x.csv")):
        check_outside(data, tmp_path / "flat" / "run")


def test_bad_images_are_kept_by_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", "cat", "dog", count=4)
    fill(tmp_path / "val", "cat", "dog", count=3)
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"junk")
    data = load_data(str(tmp_path), skip_bad_images=True)
    assert (len(data.skipped), data.skipped_val) == (1, ())
    data = load_data(str(tmp_path), skip_bad_images=True, split="train")
    assert (len(data.val), len(data.skipped)) == (8, 1)
    assert data.skipped == data.skipped_val
    (tmp_path / "val" / "dog" / "worse.png").write_bytes(b"junk")
    data = load_data(str(tmp_path), skip_bad_images=True)
    assert (len(data.val), len(data.skipped)) == (6, 2)
    assert [("worse.png" in line) for line in data.skipped_val] == [True]
    # Without a split the bad one might be of either.
    data = load_data(str(tmp_path / "train"), skip_bad_images=True, val_fraction=0.5)
    assert len(data.skipped) == 1
    assert data.skipped == data.skipped_val
