"""Data sets of Hugging Face's `datasets` library (an extra: `pip install senet[datasets]`)."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from senet.data.arrays import Depth, Header
from senet.data.decoders import Decoder
from senet.data.image_data import IMAGENET_SIZE, ImageData, Reading, natural_preprocessing
from senet.data.images import BadImageError, decode_image, read_header
from senet.data.labels import (
    Labelling,
    Target,
    TaskName,
    distinct,
    held,
    read_labels,
    target_at,
    targets_of,
)
from senet.data.probe import Kind, kind_of, probed
from senet.data.splits import LABELS, Split, divided, evaluated, known_splits
from senet.errors import UserError
from senet.support.text import natural_order

PREFIX = "hf:"
_PROBED_BYTES = 2**30  # of rows that are looked at, each a whole file
_TEXTS, _DECIMALS = ("string", "large_string"), ("float16", "float32", "float64")
_LISTED = 100_000  # classes of a column of values: more are no classes


@dataclass(frozen=True)
class Labels:
    """The classes of a column.

    Attributes:
        names: in the order of their numbers.
        numbers: of the column's values, as text; None: it holds the numbers themselves.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, int] | None = None

    def number(self, value: Any) -> int:
        """The number of a value of the column; -1: of no class."""
        if self.numbers is not None:
            return -1 if value is None else self.numbers.get(str(value), -1)
        return value if value is not None and 0 <= value < len(self.names) else -1


class HuggingFaceImages(Dataset[tuple[Any, Target]]):
    """One split, read from its Arrow files at each access.

    Args:
        rows: a `datasets.Dataset`; its image column is left undecoded.
        image: name of the image column.
        targets: (N,) classes, or (N,K) labels or numbers.
        name: what errors call it.
        channels, decoder, depth: as for `senet.data.load_image`.

    Raises:
        BadImageError: on access, names the row that cannot be read.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        targets: Tensor,
        name: str,
        channels: int,
        decoder: Decoder = "pillow",
        depth: Depth = "8",
    ) -> None:
        self.rows, self.image, self.name, self.channels = rows, image, name, channels
        self.decoder, self.depth = decoder, depth
        self.targets = held(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        name = f"{self.name}, row {index}"
        data = content_of(self.rows[index][self.image], name)
        image = decode_image(data, name, self.channels, self.decoder, self.depth)
        return image, target_at(self.targets, index)

    def subset(self, indices: Sequence[int]) -> "HuggingFaceImages":
        """The data set of these images, in this order."""
        other = HuggingFaceImages.__new__(HuggingFaceImages)
        other.__dict__.update(self.__dict__)
        other.rows = self.rows.select(list(indices))
        other.targets = self.targets[torch.as_tensor(indices, dtype=torch.int64)]
        return other


@contextmanager
def _offline(unless: bool) -> Iterator[None]:
    """Let `datasets` use what is on this machine only: nothing is fetched unasked."""
    if unless:
        yield
        return
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def content_of(value: Mapping[str, Any] | bytes | None, name: str) -> bytes:
    """The image file in an undecoded cell, which holds its bytes or its path.

    Raises:
        BadImageError: there is none.
    """
    if isinstance(value, bytes):
        return value
    data: bytes | None = None if value is None else value["bytes"]
    if data is None:
        try:
            data = Path((value or {})["path"]).read_bytes()
        except (OSError, TypeError, KeyError) as error:
            raise BadImageError(name, str(error)) from error
    if not data:
        raise BadImageError(name, "the file is empty")
    return data


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder, of all splits or of one."""
    return any((folder / f"dataset_{kind}.json").exists() for kind in ("dict", "info"))


def load_hugging_face(data: str, reading: Reading) -> ImageData:
    """`senet.data.load_data` for hf:NAME.

    NAME is a folder that `save_to_disk` wrote (of all splits, or of one), or what `load_dataset`
    takes: a repository (`owner/name`, with `:CONFIGURATION` where there are several) or a local
    folder. The columns are found by their types, one `Image`, one `ClassLabel` (or one of texts,
    numbers or lists with a usual name), or named; lists and several columns are labels or numbers,
    see `senet.data.labels.read_labels`. Code in a data set's repository is never run.

    Raises:
        UserError: `datasets` is not installed, it is not there, or its columns are others.
    """
    train, val = open_splits(data, data.removeprefix(PREFIX), reading, streaming=False)
    if val is not None and reading.val_fraction is not None:
        raise UserError(
            f"{data} has a split of its own: leave out val_fraction {reading.val_fraction}"
        )
    if val is None and reading.val_fraction is None and not reading.whole:
        raise UserError(
            f"{data} has one split only: set aside a part of it with --val-fraction 0.1"
        )
    if val is not None and val is not train:
        reading = replace(reading, classes=None)
    image, columns = find_columns(train.features, data, reading)
    parts = [part for part in (train, val) if part is not None]
    found = _labelled(parts, columns, data, reading)
    raw = [undecoded(part, image) for part in parts]
    kind = kind_of(_headers(raw[0], image), reading.channels) if len(raw[0]) else Kind(3, None)
    channels, depth = reading.as_asked(kind)
    train, *others = (
        HuggingFaceImages(part, image, targets, data, channels, reading.decode, depth)
        for part, targets in zip(raw, found.targets, strict=True)
    )
    if others:
        (val,) = others
    elif reading.val_fraction is not None:
        fraction, seed = reading.val_fraction, reading.seed
        kept, aside = divided(train.targets, found.task, found.names, fraction, seed)
        train, val = train.subset(kept), train.subset(aside)
    else:
        val = train
    size = reading.image_size or kind.side or IMAGENET_SIZE
    return ImageData(
        data,
        train,
        val,
        found.names,
        natural_preprocessing(size, channels, depth),
        task=found.task,
        notes=(found.note,) if found.note else (),
    )


class _Labelled(NamedTuple):
    """The targets of each split, what they are, the names of a network's outputs, and a note."""

    targets: list[Tensor]
    task: TaskName
    names: tuple[str, ...]
    note: str = ""


def _labelled(
    parts: Sequence[Any], columns: Sequence[str], where: str, reading: Reading
) -> _Labelled:
    """What is in the columns of labels.

    Raises:
        UserError: an image without a class, a label of a later part that the first one lacks, or
            as for `find_labels` and `read_labels`.
    """
    import datasets

    kind = parts[0].features[columns[0]]
    plain = isinstance(kind, datasets.ClassLabel) or not _may_be_other(kind)
    read = None
    if len(columns) > 1 or not plain or reading.task not in (None, "classification"):
        read = _read(parts, columns, where, reading)
    if read is None or read.task == "classification":
        labels = find_labels(parts[0], columns[0], where, reading)
        targets = [_class_targets(part, columns[0], labels, where) for part in parts]
        return _Labelled(targets, "classification", labels.names)
    own = read.labels[: len(parts[0])]
    inner = getattr(kind, "feature", kind)
    if read.names is not None:
        names = read.names
    elif isinstance(inner, datasets.ClassLabel):
        names = tuple(inner.names)
    else:
        names = reading.classes or tuple(sorted(distinct(own), key=natural_order))
    targets, start = [], 0
    for part in parts:
        values, unknown = targets_of(read.labels[start : start + len(part)], read.task, names)
        if unknown:
            raise UserError(
                f"data {where}: the split {part.split or 'unnamed'} has the label "
                f"{min(unknown)!r}, which the first one lacks"
            )
        targets.append(values)
        start += len(part)
    return _Labelled(targets, read.task, names, read.note)


def _read(parts: Sequence[Any], columns: Sequence[str], where: str, reading: Reading) -> Labelling:
    """The cells of all parts, one behind the other, as `read_labels` takes them."""
    spots = [
        f"{where}, split {p.split or 'unnamed'}, row {n}" for p in parts for n in range(len(p))
    ]
    cells = [
        list(row)
        for part in parts
        for row in zip(*(_cells(part, column) for column in columns), strict=True)
    ]
    return read_labels(
        columns, cells, spots.__getitem__, f"data {where}", reading.task, reading.label_separator
    )


def _may_be_other(kind: Any) -> bool:
    """Whether a column may hold something else than classes: texts, decimals, lists."""
    import datasets

    if isinstance(kind, datasets.Value):
        return kind.dtype in (*_TEXTS, *_DECIMALS)
    return hasattr(kind, "feature")


def _cells(part: Any, column: str) -> list[Any]:
    """The values of a column, numbers of classes by their names."""
    import datasets

    kind, values = part.features[column], part[column][:]
    inner = getattr(kind, "feature", None)
    if isinstance(inner, datasets.ClassLabel):
        return [None if each is None else [inner.int2str(n) for n in each] for each in values]
    return list(values)


def _class_targets(part: Any, column: str, labels: Labels, name: str) -> Tensor:
    """(N,) class of each image.

    Raises:
        UserError: an image has none.
    """
    values = part[column][:]
    targets = torch.tensor(list(map(labels.number, values)), dtype=torch.int64)
    if (targets < 0).any():
        row = int((targets < 0).nonzero()[0])
        raise no_class(f"{name}, split {part.split or 'unnamed'}, row {row}", values[row])
    return targets


def _headers(rows: Any, image: str) -> Iterator[Header]:
    """Of many rows; a broken one is named when it is used."""
    read = 0
    for index in probed(len(rows)):
        try:
            data = content_of(rows[index][image], "")
            yield read_header(data, f"row {index}")
        except BadImageError:
            continue
        read += len(data)
        if read > _PROBED_BYTES:
            return


def open_splits(where: str, name: str, reading: Reading, *, streaming: bool) -> tuple[Any, Any]:
    """The library's own objects of the training split, and of the evaluation split or None.

    Args:
        where: what errors call it.
        name: as for `load_hugging_face`.
        reading: says which splits, and whether they may be fetched; otherwise they must be in the
            local cache.
        streaming: `datasets.IterableDataset` instead of `Dataset`; what `save_to_disk` wrote is a
            `Dataset` in any case.

    Raises:
        UserError: `datasets` is not installed, it is not there, or has no training split.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data {where} needs the library datasets: pip install 'senet[datasets]'"
        ) from error
    repository, _, configuration = name.partition(":")
    if not repository:
        raise UserError(f"data {where} lacks a name: give {where}NAME")
    try:
        with _offline(unless=reading.download):
            if is_saved(Path(repository)):
                splits = datasets.load_from_disk(repository)
                splits = splits if isinstance(splits, dict) else {"train": splits}
            else:
                splits = datasets.load_dataset(
                    repository, configuration or None, streaming=streaming
                )
    except Exception as error:  # the library raises many kinds for a name that it cannot open
        remedy = "" if reading.download or os.path.isdir(repository) else "; --download fetches it"  # noqa: PTH112
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot open data {where}: {reason}{remedy}") from error
    known: dict[Split, tuple[str, Any]] = known_splits(splits, f"data {where}")
    val = evaluated(known, reading.split, f"data {where}")
    train = known.get("train") or (val if reading.whole else None)
    if train is None:
        raise UserError(f"data {where} has no split train, only {', '.join(splits)}")
    return train[1], None if val is None else val[1]


def no_class(where: str, label: object) -> UserError:
    """The error about an image whose class is none of the data set's."""
    return UserError(
        f"{where} has the class {label}, which is none of the data set's (test splits often keep "
        "theirs secret): use data with labelled train and validation splits"
    )


def find_columns(features: Any, where: str, reading: Reading) -> tuple[str, list[str]]:
    """Names of the image column and of those of labels: those asked for, or by their types.

    Raises:
        UserError: no such column, or there is not one of each.
    """
    import datasets

    kinds = dict(features or {})
    described = ", ".join(f"{key} ({_type_of(kind)})" for key, kind in kinds.items())
    named = [reading.label_column] if reading.label_column else []
    if named and named[0] not in kinds:
        named = [title.strip() for title in named[0].split(",")]
    elif reading.task in ("multilabel", "regression") and set(reading.classes or "?") <= set(kinds):
        named = named or list(reading.classes or ())  # those of a checkpoint
    for option, wanted in (
        ("image_column", reading.image_column),
        *(("label_column", each) for each in named),
    ):
        if wanted is not None and wanted not in kinds:
            raise UserError(f"data {where} has no column {wanted!r} ({option}), it has {described}")
    images = [key for key, kind in kinds.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels:
        plain = [key for key, kind in kinds.items() if _is_plain(kind) or _may_be_other(kind)]
        labels = [key for key in plain if key.casefold() in LABELS]
    images = [reading.image_column] if reading.image_column else images
    if len(images) != 1 or (len(labels) != 1 and not named):
        raise UserError(
            f"data {where} must have one column of images and one of labels (ClassLabel, texts, "
            f"numbers or lists), or --image-column and --label-column name them; it has "
            f"{described or 'none that say their type'}"
        )
    return images[0], named or labels


def _type_of(kind: Any) -> str:
    return str(getattr(kind, "dtype", None) or type(kind).__name__)


def _is_plain(kind: Any) -> bool:
    import datasets

    words = (*_TEXTS, "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
             "uint64")  # fmt: skip
    return isinstance(kind, datasets.Value) and kind.dtype in words


def find_labels(train: Any, label: str, where: str, reading: Reading) -> Labels:
    """The classes of a column; where it holds texts or whole numbers, all that occur in it.

    Args:
        train: the training split, of either kind.
        label: name of the column.
        where: what errors call the data.
        reading: may give the classes.

    Raises:
        UserError: a column of something else, or of as many values as no classes have.
    """
    import datasets

    kind = train.features[label]
    if isinstance(kind, datasets.ClassLabel):
        return Labels(tuple(kind.names))
    if not _is_plain(kind):
        whole = where.replace("hf-stream:", "hf:", 1)
        elsewhere = "" if whole == where else f"; several labels and numbers are read by {whole}"
        raise UserError(
            f"data {where}: the column {label!r} holds {_type_of(kind)}, no classes (ClassLabel, "
            f"texts or whole numbers): name another by --label-column{elsewhere}"
        )
    names = reading.classes
    if names is None:
        found: set[str] = set()
        values: Iterable[Any] = (
            train.unique(label)
            if isinstance(train, datasets.Dataset)
            else (row[label] for row in train.select_columns([label]))
        )
        for value in values:
            if value is not None:
                found.add(str(value))
            if len(found) > _LISTED:
                raise UserError(
                    f"data {where}: the column {label!r} has more than {_LISTED:,} values, which "
                    "are no classes: name another by --label-column"
                )
        names = tuple(sorted(found, key=natural_order))
    return Labels(names, {name: number for number, name in enumerate(names)})


def undecoded(part: Any, image: str) -> Any:
    """The split with the image column as the files' bytes or paths."""
    import datasets

    return part.cast_column(image, datasets.Image(decode=False))
