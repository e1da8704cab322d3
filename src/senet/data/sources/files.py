"""Labelled image files, from wherever their names and classes come, as a data set."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from senet.data.arrays import Header
from senet.data.image_data import (
    IMAGENET_SIZE,
    ImageData,
    Reading,
    natural_preprocessing,
)
from senet.data.images import (
    FileImages,
    MemoryImages,
    endings,
    read_all,
    read_header,
)
from senet.data.labels import Label, TaskName, images_of_each, targets_of
from senet.data.probe import SMALL, Kind, kind_of, probed
from senet.data.splits import divided
from senet.errors import UserError

MEMORY_LIMIT = 256 * 2**20
"""Bytes of decoded pixels up to which a split of equally large images is held in memory."""
CHECKED_LIMIT = 64 * 2**20
"""Bytes of image files up to which a split is decoded (so checked) before the start."""


class Labelled(NamedTuple):
    """Image files and what they are labelled with.

    Attributes:
        where: what errors call them.
        paths: the files.
        labels: of each.
        task: what the labels are.
    """

    where: str
    paths: list[str]
    labels: list[Label]
    task: TaskName = "classification"


def load_files(
    name: str, train: Labelled, val: Labelled | None, reading: Reading, classes: Sequence[str]
) -> ImageData:
    """A data set of image files.

    Args:
        name: of the data set.
        train: the training images.
        val: the evaluation images; `train` itself; or None: `reading` says what to take of `train`.
        reading: how they are read.
        classes: names in the order of their numbers; of labels, or of an image's numbers.

    Raises:
        UserError: a class without images, or of `val` that `train` does not have; neither `val`
            nor a way to do without.
        BadImageError: a broken image.
    """
    targets = _numbers(train, classes)
    if reading.classes is None:  # others are not for training
        _check_no_empty_class(train, classes, targets)
    if val is None and reading.val_fraction is None and not reading.whole:
        raise UserError(
            f"{name} has no train/ with a val/ (or test/): make them, or set aside a part of its "
            "images with --val-fraction 0.1"
        )
    channels, depth = reading.as_asked(_kind(train, val, reading))
    reading = replace(reading, channels=channels, depth=depth)
    source, skipped = _read(train, classes, targets, reading)
    skipped_val = skipped
    if val is train:
        val_source = source
    elif val is not None:
        val_targets = _numbers(val, classes)
        _tell_missing(val, classes, val_targets)
        val_source, skipped_val = _read(val, classes, val_targets, reading)
        skipped = (*skipped, *skipped_val)
    elif reading.val_fraction is not None:
        fraction, seed = reading.val_fraction, reading.seed
        parts = divided(source.targets, train.task, classes, fraction, seed)
        source, val_source = (source.subset(part) for part in parts)
    else:
        val_source = source
    own = _own_size(source)
    size = reading.image_size or (own if own == _own_size(val_source) else IMAGENET_SIZE)
    preprocessing = natural_preprocessing(size, channels, depth)
    return ImageData(
        name,
        source,
        val_source,
        tuple(classes),
        preprocessing,
        skipped,
        task=train.task,
        skipped_val=skipped_val,
    )


def _numbers(part: Labelled, classes: Sequence[str]) -> Tensor:
    """The target of each image, (N,) int64 or (N,K) float32."""
    targets, unknown = targets_of(part.labels, part.task, classes)
    if unknown:
        raise UserError(
            f"the classes differ: {shortened(sorted(unknown))} only in {part.where}, which should "
            f"have no others than {shortened(classes)}"
        )
    return targets


def _kind(train: Labelled, val: Labelled | None, reading: Reading) -> Kind:
    """What the images are, by many looked at; a bad one raises, unless it may be skipped."""
    if reading.channels is not None and reading.depth is not None:
        return Kind(reading.channels, None, reading.depth)
    paths = train.paths + (val.paths if val else [])

    def headers() -> Iterator[Header]:
        for index in probed(len(paths)):
            try:
                yield read_header(paths[index])
            except UserError:
                if not reading.skip_bad_images:
                    raise

    return kind_of(headers(), reading.channels, side=False)


def _own_size(source: MemoryImages | FileImages) -> int:
    """Height of small square images in memory, otherwise ImageNet's."""
    if isinstance(source, MemoryImages):
        height, width = source.images.shape[-2:]
        if height == width <= SMALL:
            return int(height)
    return IMAGENET_SIZE


def _empty(task: TaskName, classes: Sequence[str], targets: Tensor) -> list[str]:
    counts = images_of_each(targets, task, len(classes)).tolist()
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]


def _check_no_empty_class(part: Labelled, classes: Sequence[str], targets: Tensor) -> None:
    empty = _empty(part.task, classes, targets)
    if empty and part.task == "multilabel":
        warnings.warn(
            f"label {shortened(empty)} is on no image of {part.where}: a network only learns that "
            "it is not there",
            stacklevel=4,
        )
    elif empty:
        raise UserError(
            f"class {shortened(empty)} without readable images in {part.where}: add images "
            f"({' '.join(sorted(endings()))}) or remove the class"
        )


def _tell_missing(val: Labelled, classes: Sequence[str], targets: Tensor) -> None:
    """The numbers are those of training, so that a class without evaluation images does no harm."""
    if not len(targets):
        raise UserError(f"{val.where} has no images of the classes {shortened(classes)}")
    if empty := _empty(val.task, classes, targets):
        warnings.warn(
            f"class {shortened(empty)} has no images in {val.where}: nothing is said about it",
            stacklevel=4,
        )


def shortened(names: Sequence[str]) -> str:
    """A few of many names, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more


def _read(
    part: Labelled, classes: Sequence[str], targets: Tensor, reading: Reading
) -> tuple[MemoryImages | FileImages, tuple[str, ...]]:
    """One split, in memory if it is small, and a line for each image that was skipped."""
    paths, skip, decode = part.paths, reading.skip_bad_images, reading.decode
    channels, depth = reading.channels, reading.depth
    assert channels is not None
    assert depth is not None
    if not skip and not _files_within(paths, CHECKED_LIMIT):
        return FileImages(paths, targets, channels, decode, depth), ()
    images, bad = read_all(paths, channels, memory_limit=MEMORY_LIMIT, decoder=decode, depth=depth)
    if bad and not skip:
        raise next(iter(bad.values()))
    good = [i for i in range(len(paths)) if i not in bad]
    before, targets = targets, targets[good]
    empty = _empty(part.task, classes, before)
    lost = [name for name in _empty(part.task, classes, targets) if name not in empty]
    if lost and part.task == "classification":
        raise UserError(
            f"class {shortened(lost)} without readable images in {part.where}: add images, or "
            "remove the class"
        )
    skipped = tuple(str(error) for error in bad.values())
    if images is not None:
        return MemoryImages(images, targets), skipped
    return FileImages([paths[i] for i in good], targets, channels, decode, depth), skipped


def _files_within(paths: Sequence[str], limit: int) -> bool:
    total = 0
    for path in paths:
        total += Path(path).stat().st_size
        if total > limit:
            return False
    return True
