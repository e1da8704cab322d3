"""Data from a CSV file of image files and their classes."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from senet.data.image_data import ImageData, Reading
from senet.data.sources.files import Labelled, load_files
from senet.data.splits import LABELS, Split, evaluated, known_splits, split_of
from senet.errors import UserError
from senet.support.text import decoded, natural_order, printable

SUFFIXES = (".csv", ".tsv")
_IMAGE = (
    "image", "file", "filename", "file_name", "filepath", "file_path", "path", "image_path",
    "imagepath", "image_file", "image_name", "img", "img_path", "images", "image_id", "id",
)  # fmt: skip
_SPLIT = ("split", "set", "subset", "partition")


def load_table(data: str, reading: Reading) -> ImageData:
    """`senet.data.load_data` for a CSV file with a row an image.

    Its first line names the columns: one of file names, seen from the CSV's own folder, one of
    classes, and maybe one called split (train, val, test).
    """
    path, name = Path(data), printable(data)
    header, rows = _read(path)
    image = _column(header, reading.image_column, _IMAGE, "image", name)
    label = _column(header, reading.label_column, LABELS, "label", name)
    if image == label:
        raise UserError(f"{name}: the column {header[image]!r} cannot be both image and class")
    parts: dict[str, tuple[list[str], list[str]]] = {}
    split = next((i for i, title in enumerate(header) if title.casefold() in _SPLIT), None)
    for number, row in enumerate(rows, start=2):
        if not any(row):
            continue
        if len(row) <= max(image, label, split or 0):
            raise UserError(f"{name}, line {number}: {len(row)} columns instead of {len(header)}")
        if not row[label].strip():
            raise UserError(f"{name}, line {number}: no class in the column {header[label]!r}")
        named = "train" if split is None else row[split].strip()
        if split_of(named) is None:
            raise UserError(
                f"{name}, line {number}: {named!r} is no split: use train, val and test"
            )
        files, labels = parts.setdefault(named, ([], []))
        file = path.parent / row[image].strip()
        if not file.is_file() and not reading.skip_bad_images:
            raise UserError(f"{name}, line {number}: no such file: {printable(str(file))}")
        files.append(str(file))
        labels.append(row[label].strip())
    return _load(name, parts, reading)


def _load(
    name: str, parts: Mapping[str, tuple[list[str], list[str]]], reading: Reading
) -> ImageData:
    if not parts:
        raise UserError(f"{name} has no images: it needs a row an image")
    labelled = {
        part: Labelled(name if len(parts) == 1 else f"{name}, split {part}", *content)
        for part, content in parts.items()
    }
    splits: dict[Split, tuple[str, Labelled]] = known_splits(labelled, name)
    val = evaluated(splits, reading.split, name) if len(splits) > 1 or reading.split else None
    if "train" not in splits and not reading.whole:
        raise UserError(f"{name} has no rows of the split train")
    if val is not None and reading.val_fraction is not None:
        raise UserError(
            f"{name} has a split of its own: leave out val_fraction {reading.val_fraction}"
        )
    train = splits.get("train") or next(iter(splits.values()))
    if "train" in splits and len(splits) > 1:
        reading = replace(reading, classes=None)
    classes = reading.classes or tuple(sorted(set(train[1].labels), key=natural_order))
    return load_files(name, train[1], val[1] if val else None, reading, classes)


def _read(path: Path) -> tuple[list[str], Sequence[list[str]]]:
    try:
        text = decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(str(path))} is not in UTF-8: save it as such") from error
    first = text.partition("\n")[0]
    separator = max("\t;,", key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise UserError(f"{printable(str(path))} is no CSV file: {error}") from error
    if not rows or len(rows[0]) < 2:
        raise UserError(
            f"{printable(str(path))} needs a first line with the names of at least two columns, "
            "such as file,label"
        )
    return [title.strip() for title in rows[0]], rows[1:]


def _column(
    header: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, name: str
) -> int:
    """Number of a column: the one of that name, else the first of the usual names."""
    if wanted is not None:
        if wanted not in header:
            raise UserError(
                f"{name} has no column {wanted!r} ({what}_column), only {', '.join(header)}"
            )
        return header.index(wanted)
    folded = [title.casefold() for title in header]
    found = [folded.index(title) for title in usual if title in folded]
    if len(found) == 1 or (found and what == "image"):
        return found[0]
    why = "several columns" if found else "no column"
    raise UserError(
        f"{name} has {why} that may be the {what}'s ({', '.join(header)}): name one by "
        f"--{what}-column"
    )
