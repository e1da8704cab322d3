"""Data by name: the embedded set, torchvision's, folders, tables, shards:, hf:, hf-stream:."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torchvision import datasets

from senet.data.arrays import Depth, check_turbo
from senet.data.decoders import Decoder, check_decoder
from senet.data.image_data import (
    IMAGENET_MEAN,
    IMAGENET_SIZE,
    IMAGENET_STD,
    ImageData,
    Reading,
    preprocessing_for,
)
from senet.data.images import FileImages, ImageSource, MemoryImages
from senet.data.labels import TaskName
from senet.data.probe import Kind
from senet.data.shards.load import load_shards
from senet.data.shards.read import PREFIX as SHARDS
from senet.data.shards.read import BadShards
from senet.data.sources import embedded
from senet.data.sources.folders import load_folder, takes
from senet.data.sources.hugging_face import PREFIX as HUGGING_FACE
from senet.data.sources.hugging_face import is_saved, load_hugging_face
from senet.data.sources.stream import PREFIX as HUGGING_FACE_STREAM
from senet.data.sources.stream import load_stream
from senet.data.sources.table import SUFFIXES as TABLES
from senet.data.sources.table import load_table
from senet.data.splits import Split
from senet.data.walk import names_below
from senet.errors import SenetError, UserError
from senet.support.text import printable

_IMAGENET_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class _Remote:
    """A data set of torchvision: how to open it, what must lie where, its pixels' statistics."""

    folder: str
    files: str
    open: Callable[[Path, bool], tuple[Any, Any]]
    can_download: bool = True
    pixels: bool = True  # it comes as pixels, not as image files
    size: int = IMAGENET_SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


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
        pixels=False,
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
        pixels=False,
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
    channels: int | None = None,
    depth: Depth | None = None,
    colours: bool = False,
    skip_bad_images: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    task: TaskName | None = None,
    shuffle_buffer: int | None = None,
    bad_shards: BadShards | None = None,
    decode: Decoder | None = None,
    epoch_size: int | None = None,
    split: Split | None = None,
    whole: bool = False,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> ImageData:
    """Open a data set by name or by folder.

    `shards:PLACE` opens what `senet shard` wrote, or a folder of WebDataset's tars, see
    `senet.data.shards`; `hf:NAME` a data set of Hugging Face's `datasets`, see
    `senet.data.sources.hugging_face`, and `hf-stream:NAME` the same as a stream that is not kept on
    the disk, see `senet.data.sources.stream`; `FILE.csv`
    and `FILE.parquet` image files and their labels in a table.

    A folder holds `train/` and `val/` (or `test/`; `training`, `validation`, `valid`, … likewise),
    each with one folder of images a class, or directly one folder a class, of which `val_fraction`
    is set aside. Up to `CHECKED_LIMIT` bytes of files are decoded before the start, so that a
    broken one is found at once; larger folders are decoded as they are used, and a broken file
    raises a `BadImageError` with its name then. Images of one size, up to `MEMORY_LIMIT` bytes of
    pixels, stay decoded in memory.

    The input's size is 28 for the embedded set and Fashion-MNIST, 32 for CIFAR, the images' own
    size for square images of up to 64 pixels (of a folder or table: in memory), otherwise 224
    (resized to 256 and cropped). Grey data stays one channel: a folder, table, `hf:` set or tars
    are grey if all images are, or all of 10,000 at random; a stream if the first images of up to 16
    of its files are. Images of other numbers of channels keep them (transparency is laid on white),
    16-bit and floating-point pixels their depth, where all images are of that kind; mean and
    deviation of such are unknown (`senet.data.image_data.is_unmeasured`): training measures them.

    Args:
        data: one of `DATA_SETS`, a folder, FILE.csv, FILE.parquet, shards:PLACE, hf:NAME or
            hf-stream:NAME.
        root: where torchvision's data sets lie or are downloaded to, and fetched shards.
        download: fetch a missing data set (never done unasked).
        val_fraction: part of each class set aside for evaluation, between 0 and 1; only for data
            without a split of their own.
        image_size: height and width of the network's input in pixels, instead of the default.
        channels: what the network takes, instead of what the images are: 3 of grey images for a
            network for colours, 4 of RGBA whose fourth is no transparency.
        depth: "8", "16" or "float", likewise: "8" reads 16-bit images as 8-bit.
        colours: grey images are for a network for colours, where `channels` is None.
        skip_bad_images: decode every image of a folder or table now, leave out the broken ones and
            list them in `ImageData.skipped`.
        image_column: of an hf: set, a stream or a table with several columns that may be meant.
        label_column: likewise. Several columns of labels, separated by commas, of a table or hf:
            set are labels that an image has (1) or not (0), or numbers.
        label_separator: between several labels in a cell of one column, such as ";"; found
            where labels separated by ; or | occur on their own too.
        task: what a table's labels are: "classification" (one class an image), "multilabel" (any
            number of labels) or "regression" (numbers); by default what the columns hold, see
            `senet.data.labels.read_labels`, and `ImageData.notes` says so.
        shuffle_buffer: images within which the order of an epoch is shuffled: of shards (10,000
            by default), or of a stream, which holds them in memory (1,000).
        bad_shards: "fail" at a broken shard, or "skip" it; "fail" by default.
        decode: "pillow" (default), or "turbo": JPEG through torchvision's decoder, see
            `senet.data.decoders`; not for sets that come as pixels (embedded, CIFAR,
            Fashion-MNIST).
        epoch_size: training images of an epoch of a stream, where its card does not say how many
            there are, or where an epoch should have fewer.
        split: what becomes `ImageData.val`, "train", "val" or "test"; by default the validation
            images, or where there are none, the test images.
        whole: data without a split of their own, and without val_fraction, are all for evaluation.
        classes: names in the order of their numbers, such as a checkpoint's, for folders, tables,
            tars and columns of texts without a split of their own; by default those of the data,
            sorted.
        seed: of the choice of the images set aside.

    Raises:
        UserError: unknown data set, missing files, empty folder, class without images, a class in
            val that train does not have, a single class, an option where there is no use for it,
            a decoder that does not work here; BadImageError, a subclass: a broken image.
        SenetError: a download failed, or the embedded files are damaged.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be at least 1 pixel, not {image_size}")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, not {val_fraction}")
    if channels is not None and channels < 1:
        raise UserError(f"channels must be at least 1, not {channels}")
    if depth not in (None, *get_args(Depth)):
        raise UserError(f"depth must be one of {', '.join(get_args(Depth))}, not {depth!r}")
    if task not in (None, *get_args(TaskName)):
        raise UserError(f"task must be one of {', '.join(get_args(TaskName))}, got {task!r}")
    reading = Reading(
        val_fraction=val_fraction,
        image_size=image_size,
        channels=channels,
        depth=depth,
        colours=colours,
        skip_bad_images=skip_bad_images,
        image_column=image_column,
        label_column=label_column,
        label_separator=label_separator,
        task=task,
        split=split,
        whole=whole,
        classes=None if classes is None else tuple(classes),
        decode=check_decoder(decode or "pillow"),
        seed=seed,
        download=download,
    )
    streamed, sharded = data.startswith(HUGGING_FACE_STREAM), data.startswith(SHARDS)
    if epoch_size is not None and not streamed:
        raise UserError(f"epoch_size is for hf-stream:NAME, not for {data}")
    if shuffle_buffer is not None and not (streamed or sharded):
        raise UserError(
            f"shuffle_buffer is for shards:PLACE and hf-stream:NAME, not for {data}, which is "
            "shuffled as a whole"
        )
    if bad_shards is not None and not sharded:
        if streamed:
            _refuse_for(data, bad_shards=bad_shards)
        raise UserError(f"bad_shards is for shards:PLACE, not for {data}")
    skip = skip_bad_images or None
    columns = {"image_column": image_column, "label_column": label_column}
    table = data.startswith(HUGGING_FACE) or (
        data.lower().endswith(TABLES) and Path(data).is_file()
    )
    if not table:
        if task not in (None, "classification"):
            raise UserError(
                f"task {task!r} needs labels in a table (FILE.csv, FILE.parquet or hf:NAME): "
                f"{data} has one class an image"
            )
        _refuse_for(data, label_separator=label_separator)
    if streamed:
        _refuse_for(data, val_fraction=val_fraction, skip_bad_images=skip)
        found = load_stream(data, reading, epoch_size=epoch_size, buffer=shuffle_buffer)
    elif sharded:
        _refuse_for(data, skip_bad_images=skip)
        found = load_shards(data, reading, cache=Path(root), buffer=shuffle_buffer, bad=bad_shards)
    elif data.startswith(HUGGING_FACE):
        _refuse_for(data, skip_bad_images=skip)
        found = load_hugging_face(data, reading)
    elif data in DATA_SETS:
        _refuse_for(data, **columns)
        if val_fraction is not None:
            raise UserError(f"{data} has a split of its own: leave out val_fraction {val_fraction}")
        if skip_bad_images:
            raise UserError(f"skip_bad_images is for folders of images, not for {data}")
        if decode is not None and (data == "embedded" or _REMOTE[data].pixels):
            raise UserError(f"decode is for image files, {data} comes as pixels: leave it out")
        if depth not in (None, "8"):
            raise UserError(f"{data} has 8-bit pixels: leave out depth {depth}")
        found = _load_embedded(reading) if data == "embedded" else _load_remote(data, root, reading)
        if split is not None and split not in get_args(Split):
            raise UserError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
        if split == "train":
            found = dataclasses.replace(found, val=found.train)
    else:
        if download:
            raise UserError(f"nothing to download for {data!r}: leave out download")
        if Path(data).is_dir():
            _refuse_for(data, **columns)
            found = load_folder(data, reading)
        elif data.lower().endswith(TABLES) and Path(data).is_file():
            found = load_table(data, reading)
        else:
            raise _unknown(data)
    if classes is None and len(found.classes) < 2 and found.task == "classification":
        raise UserError(
            f"{found.name} has the class {', '.join(map(repr, found.classes))} alone, so there is "
            "nothing to tell apart: give data of two classes or more"
        )
    own = found.preprocessing
    found = _with_channels(found, reading.as_asked(Kind(own.channels, None, own.depth))[0])
    check_turbo(decode, f"{found.name},", found.preprocessing.channels, found.preprocessing.depth)
    return found


def absolute_data(data: str) -> str:
    """The same data from wherever it is opened: names of files that are here, made whole.

    Args:
        data: as for `load_data`.
    """
    for prefix in (SHARDS, HUGGING_FACE_STREAM, HUGGING_FACE, ""):
        if data.startswith(prefix):
            break
    place = data.removeprefix(prefix)
    if prefix == "" and place in DATA_SETS:
        return data
    configuration = ""
    if prefix in (HUGGING_FACE, HUGGING_FACE_STREAM):
        place, colon, configuration = place.partition(":")
        configuration = colon + configuration
    here = Path(place.rpartition("/")[0] or ".") if place.endswith(".tar") else Path(place)
    if not place or not here.exists():
        return data
    return prefix + os.path.abspath(place) + configuration  # noqa: PTH100


def check_outside(data: str, out: str | os.PathLike[str]) -> None:
    """Refuse a place to write to that is read as data, which could not be opened any more then.

    Args:
        data: as for `load_data`.
        out: a folder that is not there yet.

    Raises:
        UserError: `out` would be taken for a class or a split, or lie in one.
    """
    prefix = next((p for p in (HUGGING_FACE_STREAM, HUGGING_FACE) if data.startswith(p)), "")
    place = data.removeprefix(prefix)
    folder, out = Path(place.partition(":")[0] if prefix else place), Path(out)
    if data in DATA_SETS or not place or not folder.is_dir():
        return
    if prefix:  # `datasets` looks for files in all of a folder, but for one that it saved itself
        within = folder if names_below(out, folder) and not is_saved(folder) else None
    else:
        within = takes(folder, out)
    if within is not None:
        raise UserError(
            f"{printable(str(out))} would lie in {printable(str(within))}, where every folder is "
            f"read as the data {printable(data)}: give a place outside by --out"
        )


def _unknown(data: str) -> UserError:
    close = difflib.get_close_matches(data.lower(), DATA_SETS, n=1, cutoff=0.6)
    if Path(data).is_file():
        return UserError(f"{data} is a file, but no table ({', '.join(TABLES)}): give a folder")
    if not close and ("/" in data or os.sep in data or data.lower().endswith(TABLES)):
        return UserError(f"unknown data set {data!r}, and no such folder or file")
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UserError(
        f"unknown data set {data!r}, and no such folder{hint} (known: {', '.join(DATA_SETS)})"
    )


def _refuse_for(data: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name} is not for {data}: leave it out")


def _with_channels(data: ImageData, channels: int) -> ImageData:
    """The same images as input of another number of channels."""
    before = data.preprocessing
    if channels == before.channels:
        return data
    if {channels, before.channels} != {1, 3}:
        raise UserError(
            f"{data.name} has images of {before.channels} channels, not {channels}: leave out "
            "channels"
        )
    return dataclasses.replace(data, preprocessing=before.with_channels(channels))


def _load_embedded(reading: Reading) -> ImageData:
    if reading.download:
        raise UserError("nothing to download for 'embedded': leave out download")
    train, test = embedded.read_embedded()
    statistics = (embedded.MEAN,), (embedded.STD,)
    preprocessing = preprocessing_for(reading.image_size or 28, *statistics)
    return ImageData("embedded", train, test, embedded.CLASSES, preprocessing)


def _load_remote(name: str, place: str | os.PathLike[str], reading: Reading) -> ImageData:
    remote, root, download, decoder = _REMOTE[name], Path(place), reading.download, reading.decode
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
    preprocessing = preprocessing_for(reading.image_size or remote.size, remote.mean, remote.std)
    return ImageData(name, _source(train, decoder), _source(val, decoder), classes, preprocessing)


def _source(dataset: Any, decoder: Decoder) -> ImageSource:
    """Our view of a torchvision data set: its array of pixels, or its files."""
    targets = torch.as_tensor(dataset.targets)
    if hasattr(dataset, "data"):
        pixels = torch.as_tensor(dataset.data)  # (N,H,W) grey or (N,H,W,3)
        images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return MemoryImages(images, targets)
    return FileImages([path for path, _ in dataset.imgs], targets, 3, decoder)
