"""Several labels and numbers, in CSV, Parquet and Hugging Face's data sets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import picture

from senet.data import load_data
from senet.data.augmentation import Augmentation
from senet.data.loaders import train_loader
from senet.errors import UserError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def table(folder: Path, head: str, *cells: str) -> str:
    lines = [head, *(f"{number}.png,{cell}" for number, cell in enumerate(cells))]
    (folder / "labels.csv").write_text("\n".join(lines))
    return str(folder / "labels.csv")


def refused(message: str, path: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_data(path, **{"val_fraction": 0.5, **options})
    assert "\n" not in str(caught.value)


TAGS = ("cat", "cat;dog", "", "dog", "cat; dog", "dog", "cat", "cat;dog")


def held_out(path: str, **options: Any) -> dict[bytes, torch.Tensor]:
    """The targets of all images, by their pixels."""
    data = load_data(path, val_fraction=0.25, **options)
    return {s[i][0].tobytes(): s[i][1] for s in (data.train, data.val) for i in range(len(s))}  # type: ignore[index,misc]


def test_labels_in_one_cell(pictures: Path) -> None:
    path = table(pictures, "file,label", *TAGS)
    data = load_data(path, val_fraction=0.25)
    assert (data.task, data.classes) == ("multilabel", ("cat", "dog"))
    assert data.notes == (
        "task multilabel: labels in the column 'label' are separated by ';' (--task takes another)",
    )
    found = held_out(path)
    for number, tags in enumerate(TAGS):
        wanted = [float(name in tags) for name in ("cat", "dog")]
        assert found[picture(number).tobytes()].tolist() == wanted
    assert load_data(path, val_fraction=0.5, label_separator=";").notes == ()
    refused("line 4: no class", path, task="classification")
    # Classes with such a sign in their names stay classes, unless the task says otherwise.
    whole = table(pictures, "file,label", *("a|x", "b|y") * 4)
    assert load_data(whole, val_fraction=0.5).classes == ("a|x", "b|y")
    assert load_data(whole, val_fraction=0.5, task="multilabel").classes == ("a", "b", "x", "y")


def test_columns_of_flags(pictures: Path) -> None:
    path = table(pictures, "file,cat,dog", *(f"{n % 2},{n // 4}" for n in range(8)))
    refused("several as --label-column a,b,c", path)
    refused("no column 'eel'", path, label_column="cat,eel")
    refused("names a column twice", path, label_column="cat,cat")
    data = load_data(path, val_fraction=0.5, label_column="cat, dog")
    assert (data.task, data.classes) == ("multilabel", ("cat", "dog"))
    assert len(data.val) == 4
    again = load_data(path, whole=True, task="multilabel", classes=("dog", "cat"))
    assert again.val.targets[1].tolist() == [0, 1]  # type: ignore[union-attr]
    loader = train_loader(data, Augmentation(mixup=0.2), batch_size=2, seed=0, num_workers=0)
    _, targets = next(iter(loader))
    assert (targets.shape, targets.dtype) == ((2, 2), torch.float32)
    wrong = table(pictures, "file,cat,dog", "1,0", "1,perhaps", *["0,1"] * 6)
    refused("line 3: 'perhaps' in the column 'dog' is neither 0 nor 1", wrong,
            label_column="cat,dog", task="multilabel")  # fmt: skip
    refused("hold neither 0 and 1 .* nor numbers", wrong, label_column="cat,dog")


def test_numbers(pictures: Path) -> None:
    path = table(pictures, "file,age,label", *(f"{n + 0.5},{n % 2}" for n in range(8)))
    data = load_data(path, val_fraction=0.25, label_column="age")
    assert (data.task, data.classes, len(data.val)) == ("regression", ("age",), 2)
    parts: Any = (data.train, data.val)
    found = [value for part in parts for value in part.targets.flatten().tolist()]
    assert sorted(found) == [n + 0.5 for n in range(8)]
    both = load_data(path, val_fraction=0.25, label_column="age,label")
    assert (both.task, both.classes) == ("regression", ("age", "label"))
    assert load_data(path, val_fraction=0.25).task == "classification"  # whole numbers are classes
    assert load_data(path, val_fraction=0.25, task="regression").classes == ("label",)
    for cell in ("", "nan", "old"):
        wrong = table(pictures, "file,age", "1.5", cell, *["2.5"] * 6)
        refused("line 3: .* in the column 'age' is no number", wrong, label_column="age",
                task="regression")  # fmt: skip


def test_tasks_that_the_data_do_not_have(pictures: Path) -> None:
    refused("task must be one of classification, multilabel, regression", "x", task="ranking")
    refused("task 'regression' needs labels in a table", "embedded", task="regression",
            val_fraction=None)  # fmt: skip
    refused("label_separator is not for embedded", "embedded", label_separator=";",
            val_fraction=None)  # fmt: skip
    path = table(pictures, "file,cat,dog", *["1,0"] * 8)
    refused("stands between the labels in the cells of one column", path,
            label_column="cat,dog", label_separator=";")  # fmt: skip
    refused("a class stands in one column", path, label_column="cat,dog", task="classification")


def test_parquet(pictures: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = [f"{n}.png" for n in range(8)]
    tags = [[name for name in ("cat", "dog") if name in cell] for cell in TAGS]
    numbers = [[float(n), n * 2.0] for n in range(8)]
    path = pictures / "labels.parquet"
    columns = {"file": files, "label": tags, "size": numbers, "kind": ["a", "b"] * 4}
    parquet.write_table(pa.table(columns), path)
    data = load_data(str(path), val_fraction=0.25)
    assert (data.task, data.classes) == ("multilabel", ("cat", "dog"))
    found = held_out(str(path))
    assert found[picture(4).tobytes()].tolist() == [1, 1]
    sizes = load_data(str(path), val_fraction=0.25, label_column="size")
    assert (sizes.task, sizes.classes) == ("regression", ("size_0", "size_1"))
    assert load_data(str(path), val_fraction=0.25, label_column="kind").classes == ("a", "b")
    path.write_bytes(b"PAR1" + b"\0" * 40)
    refused("is no Parquet file", str(path))


def test_hugging_face(pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "tags": datasets.List(datasets.ClassLabel(names=["cat", "dog", "eel"])),
            "x": datasets.Value("float32"),
            "y": datasets.Value("int64"),
        }
    )
    rows = {
        "image": [str(pictures / f"{n}.png") for n in range(8)],
        "tags": [[name for name in ("cat", "dog") if name in cell] for cell in TAGS],
        "x": [n / 4 for n in range(8)],
        "y": list(range(8)),
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(pictures / "saved"))
    place = f"hf:{pictures / 'saved'}"
    data = load_data(place, val_fraction=0.25, label_column="tags")
    assert (data.task, data.classes) == ("multilabel", ("cat", "dog", "eel"))
    assert data.train.targets.shape == (6, 3)  # type: ignore[union-attr]
    numbers = load_data(place, val_fraction=0.25, label_column="x,y")
    assert (numbers.task, numbers.classes) == ("regression", ("x", "y"))
    assert load_data(place, whole=True, label_column="y").task == "classification"
    known = load_data(place, whole=True, task="regression", classes=("y",))
    assert known.val.targets.flatten().tolist() == list(range(8))  # type: ignore[union-attr]
