"""WebDataset's tars that others made, without an index: found, read once through their headers.

A sample is a run of members with the same name up to its first dot: an image (`.jpg`, `.png`, …)
and its class, as text in `.cls` or as an entry of `.json`. Names in a tar only tell members apart:
nothing is unpacked.
"""

import json
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from senet.data.arrays import Header
from senet.data.image_data import IMAGENET_SIZE, ImageData, Reading, natural_preprocessing
from senet.data.images import BadImageError, endings, read_header
from senet.data.labels import read_labels
from senet.data.probe import kind_of, probed
from senet.data.shards.index import Shard, Table
from senet.data.shards.read import Place, ShardImages
from senet.data.splits import LABELS, Split, evaluated, known_splits, split_of, stratified_split
from senet.data.walk import is_junk, subfolders
from senet.errors import UserError
from senet.support.text import natural_order, printable

_LABEL_LIMIT = 2**20  # bytes of a .cls or .json that are read
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, LookupError)
_PROBED_BYTES = 2**30
_ONE_CLASS = (
    "tars have one class an image: several labels or numbers are read from a table of files and "
    "labels (FILE.csv, FILE.parquet) or from hf:NAME"
)


class Sample(NamedTuple):
    """An image in a tar: where its bytes are, and its class."""

    offset: int
    size: int
    label: str


class Tar(NamedTuple):
    """A tar file and what is in it."""

    path: Path
    samples: list[Sample]


def find_tars(folder: Path) -> dict[str, list[Path]]:
    """The tars in a folder, and in its folders of splits, by the name of the split they are for.

    A tar's split stands in its name (`train-000000.tar`) or is its folder's; otherwise "train".
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar")):
        words = [word for word in re.split(r"[^A-Za-z]+", path.stem) if split_of(word)]
        if not is_junk(path.name):
            found.setdefault(words[0] if words else "train", []).append(path)
    for inner in subfolders(folder):
        if split_of(inner.name) and (tars := sorted(inner.glob("*.tar"))):
            found.setdefault(inner.name, []).extend(p for p in tars if not is_junk(p.name))
    return found


def load_tars(
    data: str,
    folder: Path,
    tars: Mapping[str, Sequence[Path]],
    reading: Reading,
    *,
    buffer: int,
    skip_bad: bool,
) -> ImageData:
    """`senet.data.load_data` for tars without an index.

    Args:
        data: what errors call them.
        folder: that they lie in.
        tars: by the name of their split.
        reading: how they are read.
        buffer: images within which an epoch is shuffled.
        skip_bad: warn of a broken tar and leave it out.

    Raises:
        UserError: a broken tar, a sample without an image or a class.
    """
    skipped: list[tuple[str, str]] = []  # the name of the split, and what is told
    parts: dict[str, list[Tar]] = {}
    for name, paths in tars.items():
        for path in paths:
            try:
                parts.setdefault(name, []).append(Tar(path, list(_samples(path, reading))))
            except _TAR_ERRORS as error:
                if isinstance(error, UserError):
                    raise
                line = f"broken shard {printable(str(path))}: {error}"
                if not skip_bad:
                    raise UserError(
                        f"{line}; leave such shards out with --bad-shards skip"
                    ) from error
                skipped.append((name, line))
                warnings.warn(f"{line}: it is left out", stacklevel=4)
    parts = {name: [tar for tar in part if tar.samples] for name, part in parts.items()}
    parts = {name: part for name, part in parts.items() if part}
    splits: dict[Split, tuple[str, list[Tar]]] = known_splits(parts, data)
    val = evaluated(splits, reading.split, data)
    train = splits.get("train") or (val if reading.whole else None)
    if train is None:
        raise UserError(f"{data} has no images for training: name its tars train-….tar")
    if val is None and reading.val_fraction is None and not reading.whole:
        raise UserError(
            f"{data} has one split only: set aside a part of it with --val-fraction 0.1"
        )
    if val is not None and reading.val_fraction is not None:
        raise UserError(
            f"{data} has a split of its own: leave out val_fraction {reading.val_fraction}"
        )
    cells = [sample.label for tar in train[1] for sample in tar.samples]
    _check_classes(data, cells, reading)
    labels = set(cells)
    own = "train" in splits and val is not None
    classes = (None if own else reading.classes) or tuple(sorted(labels, key=natural_order))
    place = Place(str(folder), folder)
    source = _source(place, train, classes, buffer, reading)
    kind = kind_of(_headers(source), reading.channels)
    channels, depth = reading.as_asked(kind)
    source.channels, source.depth = channels, depth
    if val is not None:
        judged = _source(place, val, classes, buffer, reading)
        judged.channels, judged.depth = channels, depth
    elif reading.val_fraction is not None:
        fraction = reading.val_fraction
        kept, aside = stratified_split(source.targets, classes, fraction, reading.seed)
        source, judged = source.subset(kept), source.subset(aside)
    else:
        judged = source
    size = reading.image_size or kind.side or IMAGENET_SIZE
    preprocessing = natural_preprocessing(size, channels, depth)
    judged_name = None if val is None else val[0]
    return ImageData(
        data,
        source,
        judged,
        classes,
        preprocessing,
        tuple(line for _, line in skipped),
        skipped_val=tuple(line for name, line in skipped if judged_name in (None, name)),
    )


def _check_classes(data: str, cells: Sequence[str], reading: Reading) -> None:
    """Refuse labels that a table would not take as classes either.

    Raises:
        UserError: several in one text, or decimal numbers, and the task was not given.
    """
    rows = [(cell,) for cell in cells]
    column = reading.label_column or "cls"
    found = read_labels((column,), rows, str, data, reading.task, None)
    if found.task != "classification":
        why = found.note.partition(": ")[2].removesuffix(" (--task takes another)")
        raise UserError(f"{data}: {why}, but {_ONE_CLASS}; --task classification takes them whole")


def _source(
    place: Place,
    part: tuple[str, list[Tar]],
    classes: Sequence[str],
    buffer: int,
    reading: Reading,
) -> ShardImages:
    index = {name: number for number, name in enumerate(classes)}
    shards, tables = [], []
    for path, samples in part[1]:
        if unknown := sorted({sample.label for sample in samples} - index.keys()):
            raise UserError(
                f"{printable(str(path))} has the class {unknown[0]!r}, which is none of the "
                f"{len(classes)} of the training images"
            )
        rows = [(sample.offset, sample.size, index[sample.label]) for sample in samples]
        columns = np.array(rows, dtype=np.int64).T
        name = str(path.relative_to(place.folder))
        shards.append(Shard(name, part[0], len(samples), path.stat().st_size, "", ""))
        tables.append(Table(columns[0], columns[1], columns[2], crc32=None))
    return ShardImages(place, shards, tables, 3, buffer, reading.decode)


def _headers(source: ShardImages) -> Iterator[Header]:
    """Of many images; a broken one is named when it is used."""
    read = 0
    for index in probed(len(source)):
        try:
            name, data = source.content(index)
            yield read_header(data, name)
        except BadImageError:
            continue
        read += len(data)
        if read > _PROBED_BYTES:
            return


def _samples(path: Path, reading: Reading) -> Iterator[Sample]:
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        key, members = "", dict[str, tarfile.TarInfo]()
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
            if not member.isreg() or member.sparse or any(map(is_junk, parts)):
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("it is cut short")
            stem, _, kind = base.partition(".")
            if f"{folder}/{stem}" != key:
                yield from _sample(path, tar, key, members, reading)
                key, members = f"{folder}/{stem}", {}
            members[kind.lower()] = member
        yield from _sample(path, tar, key, members, reading)


def _sample(
    path: Path,
    tar: tarfile.TarFile,
    key: str,
    members: Mapping[str, tarfile.TarInfo],
    reading: Reading,
) -> Iterator[Sample]:
    """The sample of these members, by their endings; none of no members."""
    if not members:
        return
    where = f"{printable(str(path))}: sample {key.strip('/')!r}"
    images = [kind for kind in members if f".{kind}" in endings()]
    if reading.image_column is not None:
        images = [kind for kind in members if kind == reading.image_column.lower().lstrip(".")]
    if len(images) != 1:
        what = "no image" if not images else f"several images ({', '.join(map(repr, images))})"
        raise UserError(
            f"{where} has {what}, only {', '.join(map(repr, members))}: --image-column names the "
            "ending of the one that is meant"
        )
    image = members[images[0]]
    label = _label(tar, members, reading.label_column, where)
    if label is None:
        raise UserError(
            f"{where} has no class, only {', '.join(map(repr, members))}: it needs a .cls, or a "
            f".json with {LABELS[0]!r} or another entry that --label-column names"
        )
    yield Sample(image.offset_data, image.size, label)


def _label(
    tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], wanted: str | None, where: str
) -> str | None:
    """The class of a sample as text; None: there is none.

    Raises:
        UserError: a list, or a decimal number, in the place of a class.
    """
    kinds = [wanted.lower().lstrip(".")] if wanted else ["cls", *LABELS]
    for kind in kinds:
        if kind in members and kind != "json":
            text = _content(tar, members[kind]).decode("utf-8-sig", "backslashreplace").strip()
            return text or None
    if "json" not in members:
        return None
    try:
        entries: Any = json.loads(_content(tar, members["json"]))
    except (ValueError, RecursionError) as error:
        raise tarfile.ReadError(f"{members['json'].name!r} is no JSON") from error
    if not isinstance(entries, Mapping):
        entries = {"cls": entries}
    for name in (wanted,) if wanted else ("cls", *LABELS):
        value = entries.get(name)
        if isinstance(value, list | float):
            kind = "a list" if isinstance(value, list) else "a decimal number"
            raise UserError(f"{where} has {kind} as its class in {name!r}, but {_ONE_CLASS}")
        if isinstance(value, int | str):
            return str(value)
    return None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _LABEL_LIMIT:
        raise tarfile.ReadError(f"{member.name!r} is too large for a class")
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    with file:
        return file.read()
