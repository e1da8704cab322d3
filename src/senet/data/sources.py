"""Where images come from: the embedded set, torchvision's data sets, any folder of classes."""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from senet.data import embedded
from senet.data.hugging_face import PREFIX as HUGGING_FACE
from senet.data.hugging_face import open_hugging_face
from senet.data.images import (
    FileImages,
    ImageSource,
    MemoryImages,
    is_grey,
    read_all,
)
from senet.data.shards import PREFIX as SHARDS
from senet.data.shards import BadShards, load_shards
from senet.data.transforms import Preprocessing
from senet.errors import SenetError, UserError

MEMORY_LIMIT = 256 * 2**20
"""Bytes of decoded pixels up to which a split of equally large images is held in memory."""
CHECKED_LIMIT = 64 * 2**20
"""Bytes of image files up to which a folder's split is decoded (so checked) before the start."""
_SMALL = 64  # pixels: up to this size, an image is used whole instead of resized and cropped
_PROBES = 64  # images whose header tells whether a folder is grey

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE, _IMAGENET_RESIZE = 224, 256
_IMAGENET_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class ImageData:
    """A data set ready for the loaders.

    Attributes:
        name: what was asked for (`load_data`'s `data`).
        train: training images, a map-style data set of (PIL image, class index).
        val: evaluation images, likewise.
        classes: name of each class.
        preprocessing: how its images become the network's input.
        skipped: one line for each bad image that was left out, with path and reason.
    """

    name: str
    train: ImageSource
    val: ImageSource
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Remote:
    """A data set of torchvision: how to open it, what must lie where, its pixels' statistics."""

    folder: str
    files: str
    open: Callable[[Path, bool], tuple[Any, Any]]
    can_download: bool = True
    size: int = _IMAGENET_SIZE
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD


# Means and standard deviations: of all training pixels of each set, computed once.
_REMOTE = {
    "cifar10": _Remote(
        "",
        "the folder cifar-10-batches-py (unpacked from cifar-10-python.tar.gz, "
        "https://www.cs.toronto.edu/~kriz/cifar.html)",
        lambda root, download: (
            datasets.CIFAR10(root, train=True, download=download),
            datasets.CIFAR10(root, train=False, download=False),
        ),
        size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _Remote(
        "",
        "the folder cifar-100-python (unpacked from cifar-100-python.tar.gz, "
        "https://www.cs.toronto.edu/~kriz/cifar.html)",
        lambda root, download: (
            datasets.CIFAR100(root, train=True, download=download),
            datasets.CIFAR100(root, train=False, download=False),
        ),
        size=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "fashion-mnist": _Remote(
        "FashionMNIST/raw",
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
        "t10k-labels-idx1-ubyte (https://github.com/zalandoresearch/fashion-mnist, unpacked)",
        lambda root, download: (
            datasets.FashionMNIST(root, train=True, download=download),
            datasets.FashionMNIST(root, train=False, download=download),
        ),
        size=28,
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "imagenet": _Remote(
        "imagenet",
        f"{_IMAGENET_DEVKIT}, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from "
        "https://image-net.org, with an account; they are unpacked at the first use)",
        lambda root, _: (
            datasets.ImageNet(str(root / "imagenet"), split="train"),
            datasets.ImageNet(str(root / "imagenet"), split="val"),
        ),
        can_download=False,
    ),
    "places365": _Remote(
        "places365",
        "categories_places365.txt, places365_train_standard.txt, places365_val.txt and the folders "
        "data_256_standard and val_256 (from http://places2.csail.mit.edu)",
        lambda root, download: (
            datasets.Places365(
                root / "places365", split="train-standard", small=True, download=download
            ),
            datasets.Places365(root / "places365", split="val", small=True, download=download),
        ),
    ),
}
DATA_SETS = ("embedded", *_REMOTE)
"""Names that `load_data` knows besides folders."""


def load_data(
    data: str,
    *,
    root: str | os.PathLike[str] = "data",
    download: bool = False,
    val_fraction: float | None = None,
    image_size: int | None = None,
    skip_bad_images: bool = False,
    shuffle_buffer: int | None = None,
    bad_shards: BadShards | None = None,
    seed: int = 0,
) -> ImageData:
    """Open a data set by name or by folder.

    `shards:PLACE` opens what `senet shard` wrote, see `senet.data.shards`; `hf:NAME` a data set of
    Hugging Face's `datasets`, see `senet.data.hugging_face`.

    A folder holds `train/` and `val/` (or `test/`), each with one folder of images a class, or
    directly one folder a class, of which `val_fraction` is set aside. Up to `CHECKED_LIMIT` bytes
    of files are decoded before the start, so that a broken one is found at once; larger folders
    are decoded as they are used, and a broken file raises a `BadImageError` with its name then.
    Images of one size, up to `MEMORY_LIMIT` bytes of pixels, stay decoded in memory.

    The input's size is 28 for the embedded set and Fashion-MNIST, 32 for CIFAR, the images' own
    size for a folder of square images of up to 64 pixels in memory, otherwise 224 (resized to 256
    and cropped). Grey data stays one channel; a folder is grey if a sample of its images (all up
    to 64, otherwise 64 to 128 spread evenly over the training split) is.

    Args:
        data: one of `DATA_SETS`, a folder, shards:PLACE or hf:NAME.
        root: where torchvision's data sets lie or are downloaded to, and fetched shards.
        download: fetch a missing data set (never done unasked).
        val_fraction: part of each class set aside for evaluation, between 0 and 1; only for a
            folder without a split of its own.
        image_size: height and width of the network's input in pixels, instead of the default.
        skip_bad_images: decode every image of a folder now, leave out the broken ones and list
            them in `ImageData.skipped`; only for folders.
        shuffle_buffer: images within which the order of shards' images is shuffled (10,000).
        bad_shards: "fail" at a broken shard, or "skip" it; "fail" by default.
        seed: of the choice of the images set aside.

    Raises:
        UserError: unknown data set, missing files, empty folder, class without images, different
            classes in train and val, `val_fraction` or `skip_bad_images` where there is no use
            for it; BadImageError, a subclass: a broken image.
        SenetError: a download failed, or the embedded files are damaged.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be at least 1 pixel, not {image_size}")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, not {val_fraction}")
    if data.startswith(SHARDS):
        _refuse_for(data, val_fraction=val_fraction, skip_bad_images=skip_bad_images or None)
        return _load_shards(data, Path(root), image_size, shuffle_buffer, bad_shards)
    if shuffle_buffer is not None or bad_shards is not None:
        raise UserError(f"shuffle_buffer and bad_shards are for shards:PLACE, not for {data}")
    if data.startswith(HUGGING_FACE):
        _refuse_for(data, skip_bad_images=skip_bad_images or None)
        return _load_hugging_face(data, download, val_fraction, image_size, seed)
    if data in DATA_SETS:
        if val_fraction is not None:
            raise UserError(f"{data} has a split of its own: leave out val_fraction {val_fraction}")
        if skip_bad_images:
            raise UserError(f"skip_bad_images is for folders of images, not for {data}")
        if data != "embedded":
            return _load_remote(data, Path(root), download, image_size)
    if download:
        raise UserError(f"nothing to download for {data!r}: leave out download")
    if data == "embedded":
        train, test = embedded.read_embedded()
        statistics = (embedded.MEAN,), (embedded.STD,)
        preprocessing = _preprocessing(image_size or 28, *statistics)
        return ImageData(data, train, test, embedded.CLASSES, preprocessing)
    if not Path(data).is_dir():
        close = difflib.get_close_matches(data.lower(), DATA_SETS, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"unknown data set {data!r}, and no such folder{hint} (known: {', '.join(DATA_SETS)})"
        )
    return _load_folder(data, val_fraction, image_size, skip_bad_images, seed)


def _preprocessing(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    """Small images whole; large ones resized in ImageNet's proportion (256 for 224) and cropped."""
    resize = size if size <= _SMALL else round(size * _IMAGENET_RESIZE / _IMAGENET_SIZE)
    return Preprocessing(image_size=size, resize=resize, mean=mean, std=std, channels=len(mean))


def _refuse_for(data: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name} is not for {data}: leave it out")


def _load_shards(
    data: str,
    root: Path,
    image_size: int | None,
    shuffle_buffer: int | None,
    bad_shards: BadShards | None,
) -> ImageData:
    index, train, val, skipped = load_shards(
        data.removeprefix(SHARDS), cache=root, buffer=shuffle_buffer, bad=bad_shards
    )
    preprocessing = index.preprocessing
    if image_size is not None and image_size != preprocessing.image_size:
        preprocessing = _preprocessing(image_size, preprocessing.mean, preprocessing.std)
    return ImageData(data, train, val, index.classes, preprocessing, skipped)


def _load_hugging_face(
    data: str, download: bool, val_fraction: float | None, image_size: int | None, seed: int
) -> ImageData:
    train, val, classes = open_hugging_face(data.removeprefix(HUGGING_FACE), download=download)
    if val is not None and val_fraction is not None:
        raise UserError(f"{data} has a split of its own: leave out val_fraction {val_fraction}")
    if val is None:
        if val_fraction is None:
            raise UserError(
                f"{data} has one split only: set aside a part of it with --val-fraction 0.1"
            )
        kept, aside = _split(train.targets, classes, val_fraction, seed)
        train, val = train.subset(kept), train.subset(aside)
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    if train.channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    width, height = train.first_size
    own = width if width == height <= _SMALL else _IMAGENET_SIZE
    return ImageData(data, train, val, classes, _preprocessing(image_size or own, mean, std))


def _load_remote(name: str, root: Path, download: bool, image_size: int | None) -> ImageData:
    remote = _REMOTE[name]
    where = root / remote.folder
    if download and not remote.can_download:
        raise UserError(f"{name} cannot be downloaded: put {remote.files} into {where}")
    try:
        train, val = remote.open(root, download)
    except (ImportError, RuntimeError, OSError) as error:
        # torchvision imports scipy to unpack ImageNet's devkit, before it looks for the archive.
        if isinstance(error, ImportError) and (where / _IMAGENET_DEVKIT).exists():
            package = (error.name or "scipy").partition(".")[0]
            raise UserError(f"{name} needs {package}: pip install {package}") from error
        if download:
            raise SenetError(f"cannot download {name} to {where}: {error}") from error
        remedy = ", or pass --download (download=True)" if remote.can_download else ""
        raise UserError(
            f"{name} is missing or incomplete in {where}: put {remote.files} there{remedy}"
        ) from error
    classes = tuple(name if isinstance(name, str) else ", ".join(name) for name in train.classes)
    preprocessing = _preprocessing(image_size or remote.size, remote.mean, remote.std)
    return ImageData(name, _source(train), _source(val), classes, preprocessing)


def _source(dataset: Any) -> ImageSource:
    """Our view of a torchvision data set: its array of pixels, or its files."""
    targets = torch.as_tensor(dataset.targets)
    if hasattr(dataset, "data"):
        pixels = torch.as_tensor(dataset.data)  # (N,H,W) grey or (N,H,W,3)
        images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return MemoryImages(images, targets)
    return FileImages([path for path, _ in dataset.imgs], targets, channels=3)


def _load_folder(
    data: str, val_fraction: float | None, image_size: int | None, skip: bool, seed: int
) -> ImageData:
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
    train, skipped = _read(train_folder, classes, paths, targets, channels, skip)
    val: ImageSource
    if val_folder is not None:
        val_classes, val_paths, val_targets = _scan(val_folder)
        _check_same_classes(train_folder, classes, val_folder, val_classes)
        val, more = _read(val_folder, classes, val_paths, val_targets, channels, skip)
        skipped = (*skipped, *more)
    else:
        assert val_fraction is not None
        train_part, val_part = _split(train.targets, classes, val_fraction, seed)
        train, val = train.subset(train_part), train.subset(val_part)
    own_size = _own_size(train)
    size = image_size or (own_size if own_size == _own_size(val) else _IMAGENET_SIZE)
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    if channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return ImageData(data, train, val, classes, _preprocessing(size, mean, std), skipped)


def _own_size(source: ImageSource) -> int:
    """Height of small square images in memory, otherwise ImageNet's."""
    if isinstance(source, MemoryImages):
        height, width = source.images.shape[-2:]
        if height == width <= _SMALL:
            return int(height)
    return _IMAGENET_SIZE


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
) -> tuple[MemoryImages | FileImages, tuple[str, ...]]:
    """One split, in memory if it is small, and a line for each image that was skipped."""
    if not skip and not _files_within(paths, CHECKED_LIMIT):
        return FileImages(paths, targets, channels), ()
    images, bad = read_all(paths, channels, memory_limit=MEMORY_LIMIT)
    if bad and not skip:
        raise next(iter(bad.values()))
    good = [i for i in range(len(paths)) if i not in bad]
    targets = targets[good]
    _check_no_empty_class(folder, classes, targets)
    skipped = tuple(str(error) for error in bad.values())
    if images is not None:
        return MemoryImages(images, targets), skipped
    return FileImages([paths[i] for i in good], targets, channels), skipped


def _files_within(paths: Sequence[str], limit: int) -> bool:
    total = 0
    for path in paths:
        total += Path(path).stat().st_size
        if total > limit:
            return False
    return True


def _split(
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
