"""Data sets of Hugging Face's library, offline: made here, saved, opened."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_images import picture

from senet.data import BadImageError, ImageData, load_data, val_loader
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


def labelled(labels: Any, kind: Any, modes: Any = lambda n: "RGB", size: Any = lambda n: 8) -> Any:
    """Rows of images and of these labels."""
    contents = []
    for number in range(len(labels)):
        file = io.BytesIO()
        side = size(number)
        picture(number, (side, side), modes(number)).save(file, "png")
        contents.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"image": contents, "label": labels}, features=features)


def saved(folder: Path, rows: Any, val: Any = None) -> Path:
    splits = {"train": rows} | ({} if val is None else {"validation": val})
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def both(folder: Path, **options: Any) -> list[ImageData]:
    """The same data map-style and as a stream."""
    return [load_data(f"{prefix}{folder}", **options) for prefix in ("hf:", "hf-stream:")]


CLASSES = datasets.ClassLabel(names=["a", "b"])


def test_one_split_saved_alone(tmp_path: Path) -> None:
    labelled([0, 1] * 4, CLASSES).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(UserError, match="has one split only"):
        load_data(f"hf:{tmp_path / 'one'}")
    data = load_data(f"hf:{tmp_path / 'one'}", val_fraction=0.25)
    assert (len(data.train), len(data.val)) == (6, 2)
    assert len(load_data(f"hf:{tmp_path / 'one'}", whole=True).val) == 8
    with pytest.raises(UserError, match=r"a stream is not divided: use hf:.* with --val-fraction"):
        load_data(f"hf-stream:{tmp_path / 'one'}")


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["dog", "cat", "10", "9"], datasets.Value("string"), ("9", "10", "cat", "dog")),
        ([30, 4, 4, 100], datasets.Value("int64"), ("4", "30", "100")),
        ([True, False, True, True], datasets.Value("bool"), ("False", "True")),
    ],
)
def test_texts_and_numbers_as_classes(
    tmp_path: Path, labels: list[Any], kind: Any, names: tuple[str, ...]
) -> None:
    folder = saved(tmp_path, labelled(labels, kind), labelled(labels[:2], kind))
    for data in both(folder):
        assert data.classes == names
        loader = val_loader(data, batch_size=2, num_workers=0)
        found = [names[label] for _, part in loader for label in part.tolist()]
        assert found == [str(label) for label in labels[:2]]
        own = load_data(data.name, classes=("x", *names))  # they have a split of their own
        assert own.classes == names
    labelled(labels, kind).save_to_disk(str(tmp_path / "one"))
    some = load_data(f"hf:{tmp_path / 'one'}", whole=True, classes=("x", *names))
    assert some.classes == ("x", *names)
    assert [some.classes[label] for label in some.val.targets] == [str(x) for x in labels]  # type: ignore[union-attr]
    unknown = labelled([labels[0], "other" if isinstance(labels[0], str) else 0], kind)
    if kind.dtype != "bool":
        folder = saved(tmp_path / "unknown", labelled(labels, kind), unknown)
        with pytest.raises(UserError, match=r"row 1 has the class .*, which is none"):
            load_data(f"hf:{folder}")


def test_several_columns(tmp_path: Path) -> None:
    plain = labelled([0, 1] * 4, CLASSES)
    files = plain.cast_column("image", datasets.Image(decode=False))["image"][:]
    columns = {"image": files, "mask": files, "label": plain["label"][:]}
    features = plain.features | {"mask": datasets.Image(), "coarse": CLASSES}
    columns["coarse"] = [0, 0, 1, 1] * 2
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    folder = saved(tmp_path, rows, rows)
    for prefix in ("hf:", "hf-stream:"):
        with pytest.raises(UserError, match=r"--image-column and --label-column name them; it has"):
            load_data(f"{prefix}{folder}", image_column="image")
        with pytest.raises(UserError, match=r"has no column 'fine' \(label_column\)"):
            load_data(f"{prefix}{folder}", image_column="image", label_column="fine")
        with pytest.raises(UserError, match=r"'image' holds .*, no classes"):
            load_data(f"{prefix}{folder}", image_column="mask", label_column="image")
    for data in both(folder, image_column="mask", label_column="coarse"):
        loader = val_loader(data, batch_size=8, num_workers=0)
        assert next(iter(loader))[1].tolist() == [0, 0, 1, 1] * 2


@pytest.mark.parametrize("first", ["grey", "small"])
def test_what_the_images_are_is_not_decided_by_the_first(tmp_path: Path, first: str) -> None:
    odd = labelled(
        [0, 1] * 10,
        CLASSES,
        modes=lambda n: "L" if first == "grey" and n % 10 != 9 else "RGB",
        size=lambda n: 90 if first == "small" and n % 10 == 9 else 48,
    )
    for data in both(saved(tmp_path, odd, odd)):
        assert data.preprocessing.channels == 3
        assert data.preprocessing.image_size == (48 if first == "grey" else 224)
    for data in both(tmp_path, channels=1, image_size=32):
        assert (data.preprocessing.channels, data.preprocessing.image_size) == (1, 32)
    plain = labelled([0, 1] * 3, CLASSES, modes=lambda n: "L")
    for data in both(saved(tmp_path / "grey", plain, plain)):
        assert (data.preprocessing.channels, data.preprocessing.image_size) == (1, 8)


def test_colours_behind_many_grey_images_of_a_stream_are_told(tmp_path: Path) -> None:
    late = labelled([0, 1] * 40, CLASSES, modes=lambda n: "RGB" if n == 79 else "L")
    data = load_data(f"hf-stream:{saved(tmp_path, late, late)}")
    assert data.preprocessing.channels == 1
    with pytest.warns(UserWarning, match=r"taken as grey.*--channels 3 keeps the colours"):
        list(val_loader(data, batch_size=20, num_workers=0))
    assert load_data(f"hf:{tmp_path}").preprocessing.channels == 3


def test_splits_by_other_names(tmp_path: Path) -> None:
    rows = labelled([0, 1] * 3, CLASSES)
    splits = {"Training": rows, "valid": rows.select([0, 1]), "test": rows.select([0])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path))
    assert [len(data.val) for data in both(tmp_path)] == [2, 2]
    assert [len(data.val) for data in both(tmp_path, split="test")] == [1, 1]
    with pytest.raises(UserError, match="split must be one of"):
        load_data(f"hf:{tmp_path}", split="valid")  # type: ignore[arg-type]


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript in the first row, where the library itself would decode it."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("started"))
    rows = labelled([0, 1], CLASSES)
    bad = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
           "path": None}  # fmt: skip
    content = rows.cast_column("image", datasets.Image(decode=False))["image"][:]
    table = datasets.Dataset.from_dict(
        {"image": [bad, content[1]], "label": [0, 1]}, features=rows.features
    )
    for data in both(saved(tmp_path, table, table)):
        with pytest.raises(BadImageError, match="not an image in a format that is read"):
            list(val_loader(data, batch_size=2, num_workers=0))
