"""CSV files of image files and classes, as spreadsheets and competitions write them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_images import picture, truncate

from senet.data import load_data
from senet.errors import UserError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """0.png to 7.png in a folder images/ beside the table."""
    (tmp_path / "images").mkdir()
    for number in range(8):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def table(folder: Path, *rows: str, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes("\r\n".join(rows).encode(encoding))
    return folder / name


def refused(message: str, path: Path, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(path), **{"val_fraction": 0.5, **options})
    assert "\n" not in str(caught.value)


ROWS = [f"images/{number}.png,{('cat', 'dog, old')[number % 2]!r}" for number in range(8)]
ROWS = [row.replace("'", '"') for row in ROWS]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("head", ["file,label", "image,class", "ID,Target", "filename,species"])
def test_names_and_classes(pictures: Path, head: str, encoding: str) -> None:
    data = load_data(
        str(table(pictures, head, *ROWS, "", encoding=encoding)), val_fraction=0.25, seed=3
    )
    assert data.classes == ("cat", "dog, old")
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.preprocessing.image_size == 8
    seen = {}
    for source in (data.train, data.val):
        for index in range(len(source)):
            image, label = source[index]  # type: ignore[index]
            seen[image.tobytes()] = label
    assert seen == {picture(number).tobytes(): number % 2 for number in range(8)}


def test_a_column_of_splits_and_another_separator(pictures: Path) -> None:
    rows = [f"images/{n}.png;{n % 2 + 9};{('train', 'valid')[n > 5]}" for n in range(8)]
    path = table(pictures, "path;label;split", *rows)
    data = load_data(str(path))
    assert data.classes == ("9", "10")  # numbers in their order
    assert data.val.targets.tolist() == [0, 1]  # type: ignore[union-attr]
    refused("has a split of its own: leave out val_fraction 0.5", path)
    tabs = table(pictures, *(row.replace(";", "\t") for row in ("path;label;split", *rows)),
                 name="x.TSV")  # fmt: skip
    assert len(load_data(str(tabs)).train) == 6
    assert len(load_data(str(path), split="train").val) == 6
    wrong = table(pictures, "path;label;split", *rows, "images/1.png;9;first")
    refused("line 10: 'first' is no split", wrong)


def test_several_columns_that_may_be_meant(pictures: Path) -> None:
    rows = [f"images/{n}.png,{n % 2},{n % 4}" for n in range(8)]
    path = table(pictures, "image,class,label", *rows)
    refused("several columns that may be the label's .*name one by --label-column", path)
    assert load_data(str(path), val_fraction=0.5, label_column="class").classes == ("0", "1")
    assert len(load_data(str(path), val_fraction=0.5, label_column="label").classes) == 4
    refused(r"no column 'kind' \(label_column\), only image, class, label", path,
            label_column="kind")  # fmt: skip
    refused("'image' cannot be both image and class", path, label_column="image")
    odd = table(pictures, "photo,class", *(row.rpartition(",")[0] for row in rows))
    refused("no column that may be the image's .*--image-column", odd)
    assert len(load_data(str(odd), val_fraction=0.5, image_column="photo").train) == 4


def test_what_is_wrong_is_named_with_its_line(pictures: Path) -> None:
    refused("line 3: no such file: .*images/9.png", table(pictures, "file,label", ROWS[0],
                                                           "images/9.png,cat"))  # fmt: skip
    refused("line 2: no class in the column 'label'", table(pictures, "file,label",
                                                            "images/1.png,"))  # fmt: skip
    refused("line 2: 1 columns instead of 2", table(pictures, "file,label", "images/1.png"))
    refused("needs a first line", table(pictures, "file", "images/1.png"))
    refused("has no images", table(pictures, "file,label"))
    (pictures / "odd.csv").write_bytes(b"file,label\nimages/1.png,caf\xe9")
    refused("odd.csv is not in UTF-8", pictures / "odd.csv")
    (pictures / "not.table").write_bytes(b"x")
    refused("is a file, but no table", pictures / "not.table")
    refused("no such folder or file", pictures / "absent.csv")
    truncate(pictures / "images" / "3.png")
    path = table(pictures, "file,label", *ROWS)
    refused("images/3.png", path)
    assert len(load_data(str(path), val_fraction=0.5, skip_bad_images=True).skipped) == 1
    for option in ("image_column", "label_column"):
        with pytest.raises(UserError, match=f"{option} is not for"):
            load_data(str(pictures), **{option: "x"})  # type: ignore[arg-type]


def test_files_elsewhere(pictures: Path, tmp_path: Path) -> None:
    rows = [f"{pictures}/images/{n}.png,{n % 2}" for n in range(8)]
    (tmp_path / "deep").mkdir()
    data = load_data(str(table(tmp_path / "deep", "file,label", *rows)), val_fraction=0.5)
    assert np.asarray(data.train[0][0]).shape == (8, 8, 3)  # type: ignore[index]
