"""Data from a table, CSV or Parquet, of image files and what they are labelled with."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from senet.data.image_data import ImageData, Reading
from senet.data.labels import distinct, read_labels
from senet.data.sources.files import Labelled, load_files
from senet.data.splits import LABELS, Split, evaluated, known_splits, split_of
from senet.errors import UserError
from senet.support.text import decoded, natural_order, printable

PARQUET = ".parquet"
SUFFIXES = (".csv", ".tsv", PARQUET)
_IMAGE = (
    "image", "file", "filename", "file_name", "filepath", "file_path", "path", "image_path",
    "imagepath", "image_file", "image_name", "img", "img_path", "images", "image_id", "id",
)  # fmt: skip
_SPLIT = ("split", "set", "subset", "partition")


class _Rows(NamedTuple):
    """The rows of a table.

    Attributes:
        where: what errors call each.
        cells: of each, those of the columns that are read.
    """

    where: list[str]
    cells: list[list[Any]]


class _Table(NamedTuple):
    """A table whose cells are not read yet.

    Attributes:
        header: names of its columns.
        rows: gives those of the columns of these numbers.
    """

    header: list[str]
    rows: Callable[[Sequence[int]], _Rows]


def load_table(data: str, reading: Reading) -> ImageData:
    """`senet.data.load_data` for a table with a row an image.

    A CSV file's first line names the columns: one of file names, seen from the table's own folder,
    one or several of labels, and maybe one called split (train, val, test).
    """
    path, name = Path(data), printable(data)
    parquet = path.suffix.lower() == PARQUET
    header, read = _parquet(path, name) if parquet else _csv(path, name)
    image = _column(header, reading.image_column, _IMAGE, "image", name)
    labels = _label_columns(header, reading, name)
    if image in labels:
        raise UserError(f"{name}: the column {header[image]!r} cannot be both image and class")
    split = next((i for i, title in enumerate(header) if title.casefold() in _SPLIT), None)
    rows = read([image, *labels, *([] if split is None else [split])])
    parts: dict[str, list[int]] = {}
    files = []
    for number, (where, cells) in enumerate(zip(*rows, strict=True)):
        named = "train" if split is None else str(cells[-1]).strip()
        if split_of(named) is None:
            raise UserError(f"{where}: {named!r} is no split: use train, val and test")
        if not isinstance(cells[0], str | int):
            raise UserError(
                f"{where}: the column {header[image]!r} holds no file names"
                + ("; images themselves in Parquet are read by hf:FOLDER" if parquet else "")
            )
        file = path.parent / str(cells[0]).strip()
        if not file.is_file() and not reading.skip_bad_images:
            raise UserError(f"{where}: no such file: {printable(str(file))}")
        files.append(str(file))
        parts.setdefault(named, []).append(number)
    if not parts:
        raise UserError(f"{name} has no images: it needs a row an image")
    found = read_labels(
        [header[index] for index in labels],
        [cells[1 : 1 + len(labels)] for cells in rows.cells],
        rows.where.__getitem__,
        name,
        reading.task,
        reading.label_separator,
    )
    labelled = {
        part: Labelled(
            name if len(parts) == 1 else f"{name}, split {part}",
            [files[number] for number in numbers],
            [found.labels[number] for number in numbers],
            found.task,
        )
        for part, numbers in parts.items()
    }
    loaded = _load(name, labelled, reading, found.names)
    return replace(loaded, notes=(found.note,) if found.note else ())


def _load(
    name: str, labelled: Mapping[str, Labelled], reading: Reading, names: tuple[str, ...] | None
) -> ImageData:
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
    if names is None:
        names = reading.classes or tuple(sorted(distinct(train[1].labels), key=natural_order))
    return load_files(name, train[1], val[1] if val else None, reading, names)


def _csv(path: Path, name: str) -> _Table:
    try:
        text = decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not in UTF-8: save it as such") from error
    first = text.partition("\n")[0]
    separator = max("\t;,", key=first.count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise UserError(f"{name} is no CSV file: {error}") from error
    if not lines or len(lines[0]) < 2:
        raise UserError(
            f"{name} needs a first line with the names of at least two columns, such as file,label"
        )
    header = [title.strip() for title in lines[0]]

    def rows(columns: Sequence[int]) -> _Rows:
        found = _Rows([], [])
        for number, line in enumerate(lines[1:], start=2):
            if not any(line):
                continue
            where = f"{name}, line {number}"
            if len(line) <= max(columns):
                raise UserError(f"{where}: {len(line)} columns instead of {len(header)}")
            found.where.append(where)
            found.cells.append([line[column] for column in columns])
        return found

    return _Table(header, rows)


def _parquet(path: Path, name: str) -> _Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"{name} needs pyarrow, which comes with pip install 'senet[datasets]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{name} is no Parquet file: {str(error).splitlines()[0]}") from error
    header = list(file.schema_arrow.names)

    def rows(columns: Sequence[int]) -> _Rows:
        try:
            values = file.read(columns=[header[column] for column in columns])
        except (ArrowException, OSError) as error:
            raise UserError(f"{name} is damaged: {str(error).splitlines()[0]}") from error
        lists = [values.column(header[column]).to_pylist() for column in columns]
        cells = [list(row) for row in zip(*lists, strict=True)]
        return _Rows([f"{name}, row {number}" for number in range(len(cells))], cells)

    return _Table(header, rows)


def _label_columns(header: Sequence[str], reading: Reading, name: str) -> list[int]:
    """Numbers of the columns of labels: one, or those that are named with commas between."""
    wanted = reading.label_column
    known = reading.classes if reading.task in ("multilabel", "regression") else None
    if wanted is None and known and set(known) <= set(header):  # those of a checkpoint
        return [header.index(title) for title in known]
    if wanted is None or wanted in header:
        return [_column(header, wanted, LABELS, "label", name)]
    titles = [title.strip() for title in wanted.split(",")]
    if len(set(titles)) < len(titles):
        raise UserError(f"{name}: label_column {wanted!r} names a column twice")
    return [_column(header, title, LABELS, "label", name) for title in titles]


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
    several = ", or several as --label-column a,b,c" if what == "label" else ""
    raise UserError(
        f"{name} has {why} that may be the {what}'s ({', '.join(header)}): name one by "
        f"--{what}-column{several}"
    )
