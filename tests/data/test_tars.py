"""WebDataset's tars that others made: no index, classes in .cls or .json."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import picture

from senet.data import Augmentation, load_data, train_loader
from senet.data.image_data import Reading
from senet.data.shards.tars import _samples
from senet.errors import SenetError, UserError


def encoded(number: int, form: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    picture(number, **options).save(file, form)
    return file.getvalue()


def write(path: Path, members: Mapping[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(numbers: range, label: Any = lambda n: {"cls": b"%d" % (n % 3)}) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in numbers:
        members[f"./a/{number:04}.png"] = encoded(number)
        members |= {f"./a/{number:04}.{kind}": content for kind, content in label(number).items()}
    return members


def named(number: int) -> dict[str, bytes]:
    name = ("cat", "dog", "eel")[number % 3]
    return {"json": json.dumps({"label": name, "width": 8}).encode()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("label", [lambda n: {"cls": b" %d\n" % (n % 3)}, named])
def test_splits_by_name(tmp_path: Path, label: Any, form: int) -> None:
    for number in range(3):
        part = samples(range(number * 6, number * 6 + 6), label)
        write(tmp_path / f"my-train-{number:06}.tar", part, format=form)
    write(tmp_path / "my-val-000000.tar", samples(range(18, 24), label), format=form)
    data = load_data(f"shards:{tmp_path}")
    assert data.classes == (("cat", "dog", "eel") if label is named else ("0", "1", "2"))
    assert (len(data.train), len(data.val)) == (18, 6)
    assert data.preprocessing.image_size == 8
    for source, start in ((data.train, 0), (data.val, 18)):
        for index in range(len(source)):
            image, found = source[index]  # type: ignore[index]
            assert found == (start + index) % 3
            assert image.tobytes() == picture(start + index).tobytes()
    some = load_data(f"shards:{tmp_path}/my-train-{{000000..000001}}.tar")
    assert (len(some.train), len(some.val)) == (12, 6)
    loader = train_loader(data, Augmentation(), batch_size=6, seed=0, num_workers=2)
    taken = [label for _, labels in loader for label in labels.tolist()]
    assert sorted(taken) == sorted([0, 1, 2] * 6)


def test_splits_by_folder_and_one_split(tmp_path: Path) -> None:
    for split, count in (("training", 9), ("validation", 6)):
        write(tmp_path / "a" / split / "000.tar", samples(range(count)))
    assert len(load_data(f"shards:{tmp_path / 'a'}").val) == 6
    assert len(load_data(f"shards:{tmp_path / 'a'}", split="train").val) == 9
    one = write(tmp_path / "b" / "all.tar", samples(range(12)))
    with pytest.raises(UserError, match=r"has one split only: set aside .*--val-fraction"):
        load_data(f"shards:{tmp_path / 'b'}")
    for place in (tmp_path / "b", one):
        data = load_data(f"shards:{place}", val_fraction=0.25)
        assert (len(data.train), len(data.val)) == (9, 3)
    assert len(load_data(f"shards:{one}", whole=True).val) == 12


def test_what_to_take_of_a_sample(tmp_path: Path) -> None:
    def both(number: int) -> dict[str, bytes]:
        about = {"class_name": f"c{number % 2}", "mine": number % 4, "label": number % 3}
        return {"jpg": encoded(number, "jpeg"), "seg.png": b"x", "txt": b"a caption",
                "json": json.dumps(about).encode()}  # fmt: skip

    write(tmp_path / "x.tar", samples(range(12), both))
    place = f"shards:{tmp_path}"
    with pytest.raises(UserError, match=r"several images \('png', 'jpg'\).*--image-column"):
        load_data(place, val_fraction=0.5)
    data = load_data(place, val_fraction=0.5, image_column="png", label_column="mine")
    assert data.classes == ("0", "1", "2", "3")
    assert load_data(place, val_fraction=0.5, image_column="jpg").classes == ("0", "1", "2")
    with pytest.raises(UserError, match=r"sample '\./a/0000'.*has no class, only 'png', 'jpg'"):
        load_data(place, val_fraction=0.5, image_column="png", label_column="absent")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (lambda n: {"json": json.dumps({"label": ["cat", "red"][: n % 3]}).encode()}, "a list as"),
        (lambda n: {"json": b"[1, 2]"}, "a list as its class in 'cls'"),
        (lambda n: {"json": b'{"label": 0.5}'}, "a decimal number as its class in 'label'"),
        (lambda n: {"cls": b"%.2f" % (n / 7)}, "the column 'cls' holds decimal numbers"),
        (lambda n: {"cls": (b"cat", b"dog", b"cat;dog", b"dog;cat")[n % 4]}, "separated by ';'"),
    ],
)
def test_labels_and_numbers_are_refused_in_a_line(tmp_path: Path, label: Any, words: str) -> None:
    write(tmp_path / "x.tar", samples(range(1, 13), label))
    place = f"shards:{tmp_path}"
    with pytest.raises(UserError, match=rf"{words}.*one class an image.*FILE.csv") as refused:
        load_data(place, val_fraction=0.5)
    one_line(refused.value)
    with pytest.raises(UserError, match=r"'multilabel' needs labels in a table"):
        load_data(place, val_fraction=0.5, task="multilabel")
    if "cls" in label(1):
        whole = load_data(place, whole=True, task="classification")
        assert len(whole.classes) in (4, 12)


def test_junk_links_and_grey(tmp_path: Path) -> None:
    members = {}
    for number in range(8):
        members[f"{number}.png"] = encoded(number, mode="L")
        members[f"{number}.cls"] = b"%d" % (number % 2)
        members[f"._{number}.png"] = b"junk"
    path = write(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = load_data(f"shards:{path}", val_fraction=0.5)
    assert (len(data.train), data.preprocessing.channels) == (4, 1)


def test_broken_tars(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", samples(range(6)))
    whole = write(tmp_path / "train-1.tar", samples(range(6)))
    write(tmp_path / "val-0.tar", samples(range(3)))
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"broken shard .*train-1\.tar: .*--bad-shards skip"):
        load_data(f"shards:{tmp_path}")
    with pytest.warns(UserWarning, match=r"broken shard .*train-1\.tar.*it is left out"):
        data = load_data(f"shards:{tmp_path}", bad_shards="skip")
    assert (len(data.train), len(data.skipped), data.skipped_val) == (6, 1, ())
    packed = tmp_path / "packed" / "train.tar.gz"
    write(packed, samples(range(3)), mode="w:gz")
    with pytest.raises(UserError, match="decompress the tars"):
        load_data(f"shards:{packed.parent}")
    with pytest.raises(UserError, match=r"there is no absent\.tar"):
        load_data(f"shards:{tmp_path}/absent.tar")
    with pytest.raises(UserError, match=r"cannot read .*index\.json"):
        load_data(f"shards:{tmp_path / 'nothing'}")


def one_line(error: SenetError) -> None:
    assert str(error).isprintable()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
       keep=st.floats(0, 1.5))  # fmt: skip
def test_damaged_tars_end_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[float, int]], keep: float
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = write(folder / "x.tar", samples(range(4), named), format=tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[int(place * (len(content) - 1))] = value
    path.write_bytes(content[: int(keep * len(content))])
    try:
        data = load_data(f"shards:{path}", whole=True, bad_shards="fail")
        for index in range(len(data.val)):
            data.val[index]  # type: ignore[index]
    except SenetError as error:
        one_line(error)


def test_members_are_read_at_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", samples(range(5)))
    content = path.read_bytes()
    found = list(_samples(path, Reading()))
    assert [content[s.offset : s.offset + s.size] for s in found] == [
        encoded(number) for number in range(5)
    ]
    assert np.array_equal([int(s.label) for s in found], [0, 1, 2, 0, 1])
