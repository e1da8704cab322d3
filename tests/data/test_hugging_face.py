"""Data sets of Hugging Face's library, offline: made here, saved, opened."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from senet.data import BadImageError, load_data
from senet.errors import UserError

datasets = pytest.importorskip("datasets")
MakeFolder = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_saved_data_set(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder({"train": {"cat": 4, "dog": 5}, "val": {"cat": 2, "dog": 2}})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def rows(split: str) -> object:
        paths = sorted((folder / split).rglob("*.png"))
        return datasets.Dataset.from_dict(
            {
                "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
                "label": [int(path.parent.name == "dog") for path in paths],
            },
            features=features,
        )

    splits = datasets.DatasetDict({"train": rows("train"), "validation": rows("val")})
    splits.save_to_disk(str(tmp_path / "saved"))
    data, plain = load_data(f"hf:{tmp_path / 'saved'}"), load_data(str(folder))
    assert data.classes == ("cat", "dog")
    assert data.preprocessing.image_size == 8
    for split in ("train", "val"):
        ours, theirs = getattr(data, split), getattr(plain, split)
        assert len(ours) == len(theirs)
        for index in range(len(ours)):
            assert ours[index][1] == theirs[index][1]
            assert ours[index][0].tobytes() == theirs[index][0].tobytes()
    with pytest.raises(UserError, match="has a split of its own"):
        load_data(f"hf:{tmp_path / 'saved'}", val_fraction=0.5)


def test_a_folder_through_the_library(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = make_folder({"train": {"cat": 6, "dog": 6}})
    data = load_data(f"hf:{folder}", val_fraction=0.5)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (6, 6)
    assert isinstance(data.train[0][0], Image.Image)
    with pytest.raises(UserError, match="has one split only: set aside a part"):
        load_data(f"hf:{folder}")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot open data hf:nobody/nothing: .*--download"):
        load_data("hf:nobody/nothing")


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    good = tmp_path / "good.png"
    Image.new("RGB", (8, 8)).save(good)
    images = [{"bytes": good.read_bytes(), "path": None}, {"bytes": b"none", "path": None}]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 0]}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    data = load_data(f"hf:{tmp_path / 'saved'}")
    data.train[0]
    with pytest.raises(BadImageError, match=r"saved, row 1': not an image"):
        data.train[1]
