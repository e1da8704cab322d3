"""Data from folders of images, one folder a class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from senet.data.decoders import Decoder
from senet.data.image_data import IMAGENET_SIZE, SMALL, ImageData, natural_preprocessing
from senet.data.images import FileImages, ImageSource, MemoryImages, is_grey, read_all
from senet.errors import UserError

MEMORY_LIMIT = 256 * 2**20
"""Bytes of decoded pixels up to which a split of equally large images is held in memory."""
CHECKED_LIMIT = 64 * 2**20
"""Bytes of image files up to which a folder's split is decoded (so checked) before the start."""
_PROBES = 64  # images whose header tells whether a folder is grey


def load_folder(
    data: str,
    val_fraction: float | None,
    image_size: int | None,
    skip: bool,
    seed: int,
    decoder: Decoder,
) -> ImageData:
    """`senet.data.load_data` for a folder."""
    folder = Path(data)
    train_folder = folder / "train"
    val_folder = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), None)
    if not train_folder.is_dir():
        if val_folder is not None:
            raise UserError(f"{folder} has {val_folder.name}/ but no train/: add train/")
        train_folder = folder
    elif val_folder is not None and val_fraction is not None:
        raise UserError(f"{folder} has {val_folder.name}/: leave out val_fraction {val_fraction}")
    classes, paths, targets = _scan(train_folder)
    if val_folder is None and val_fraction is None:
        raise UserError(
            f"{folder} has no train/ with a val/ (or test/): make them, or set aside a part of its "
            "images with --val-fraction 0.1"
        )
    step = max(1, len(paths) // _PROBES)
    channels = 1 if _all_grey(paths[::step], skip) else 3
    train, skipped = _read(train_folder, classes, paths, targets, channels, skip, decoder)
    val: ImageSource
    if val_folder is not None:
        val_classes, val_paths, val_targets = _scan(val_folder)
        _check_same_classes(train_folder, classes, val_folder, val_classes)
        val, more = _read(val_folder, classes, val_paths, val_targets, channels, skip, decoder)
        skipped = (*skipped, *more)
    else:
        assert val_fraction is not None
        train_part, val_part = stratified_split(train.targets, classes, val_fraction, seed)
        train, val = train.subset(train_part), train.subset(val_part)
    own_size = _own_size(train)
    size = image_size or (own_size if own_size == _own_size(val) else IMAGENET_SIZE)
    preprocessing = natural_preprocessing(size, channels)
    return ImageData(data, train, val, classes, preprocessing, skipped)


def _own_size(source: ImageSource) -> int:
    """Height of small square images in memory, otherwise ImageNet's."""
    if isinstance(source, MemoryImages):
        height, width = source.images.shape[-2:]
        if height == width <= SMALL:
            return int(height)
    return IMAGENET_SIZE


def _scan(folder: Path) -> tuple[tuple[str, ...], list[str], Tensor]:
    """Classes (the folders, sorted), image paths (sorted within each) and their class indices."""
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders: it needs one folder of images a class")
    index = {name: i for i, name in enumerate(classes)}
    samples = make_dataset(str(folder), index, IMG_EXTENSIONS, allow_empty=True)
    targets = torch.tensor([target for _, target in samples], dtype=torch.int64)
    _check_no_empty_class(folder, classes, targets)
    return tuple(classes), [path for path, _ in samples], targets


def _check_no_empty_class(folder: Path, classes: Sequence[str], targets: Tensor) -> None:
    counts = torch.bincount(targets, minlength=len(classes)).tolist()
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"class {_shortened(empty)} without readable images in {folder}: add images "
            f"({' '.join(IMG_EXTENSIONS)}) or remove the folder"
        )


def _check_same_classes(
    train_folder: Path, train: tuple[str, ...], val_folder: Path, val: tuple[str, ...]
) -> None:
    differences = []
    if only := sorted(set(train) - set(val)):
        differences.append(f"{_shortened(only)} only in {train_folder}")
    if only := sorted(set(val) - set(train)):
        differences.append(f"{_shortened(only)} only in {val_folder}")
    if differences:
        raise UserError(
            f"the classes differ: {'; '.join(differences)}; both must have the same folders"
        )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more


def _all_grey(paths: Sequence[str], skip: bool) -> bool:
    """Whether every readable one of these images is grey; a bad one raises unless `skip`."""
    grey = []
    for path in paths:
        try:
            grey.append(is_grey(path))
        except UserError:
            if not skip:
                raise
    return bool(grey) and all(grey)


def _read(
    folder: Path,
    classes: Sequence[str],
    paths: list[str],
    targets: Tensor,
    channels: int,
    skip: bool,
    decoder: Decoder,
) -> tuple[MemoryImages | FileImages, tuple[str, ...]]:
    """One split, in memory if it is small, and a line for each image that was skipped."""
    if not skip and not _files_within(paths, CHECKED_LIMIT):
        return FileImages(paths, targets, channels, decoder), ()
    images, bad = read_all(paths, channels, memory_limit=MEMORY_LIMIT, decoder=decoder)
    if bad and not skip:
        raise next(iter(bad.values()))
    good = [i for i in range(len(paths)) if i not in bad]
    targets = targets[good]
    _check_no_empty_class(folder, classes, targets)
    skipped = tuple(str(error) for error in bad.values())
    if images is not None:
        return MemoryImages(images, targets), skipped
    return FileImages([paths[i] for i in good], targets, channels, decoder), skipped


def _files_within(paths: Sequence[str], limit: int) -> bool:
    total = 0
    for path in paths:
        total += Path(path).stat().st_size
        if total > limit:
            return False
    return True


def stratified_split(
    targets: Tensor, classes: Sequence[str], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices for training and evaluation: of each class the same fraction, at least one image."""
    generator = torch.Generator().manual_seed(seed)
    val: list[int] = []
    for label, name in enumerate(classes):
        members = torch.nonzero(targets == label).flatten()
        if len(members) < 2:
            raise UserError(
                f"class {name!r} has only {len(members)} image: val_fraction needs at least 2"
            )
        count = min(max(1, round(len(members) * val_fraction)), len(members) - 1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        val.extend(shuffled[:count].tolist())
    chosen = set(val)
    return [i for i in range(len(targets)) if i not in chosen], sorted(chosen)
