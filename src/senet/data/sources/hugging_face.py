"""Data sets of Hugging Face's `datasets` library (an extra: `pip install senet[datasets]`)."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from senet.data.decoders import Decoder
from senet.data.images import GREY_MODES, BadImageError, decode_image, to_mode
from senet.errors import UserError

PREFIX = "hf:"
_TRAIN, _VAL = ("train",), ("validation", "val", "test")


class HuggingFaceImages(Dataset[tuple[Image.Image, int]]):
    """One split, read from its Arrow files at each access.

    Args:
        rows: a `datasets.Dataset`; its image column is left undecoded.
        image: name of the image column.
        label: name of the class column.
        name: what errors call it.
        channels: 1 (grey) or 3 (RGB).
        decoder: as for `senet.data.load_image`.

    Raises:
        UserError: an image has no class.
        BadImageError: on access, names the row that cannot be read.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        label: str,
        name: str,
        channels: int,
        decoder: Decoder = "pillow",
    ) -> None:
        self.rows, self.image, self.name, self.channels = rows, image, name, channels
        self.decoder = decoder
        labels = [-1 if value is None else value for value in rows[label][:]]
        self.targets: Tensor = torch.tensor(labels, dtype=torch.int64)
        wrong = (self.targets < 0) | (self.targets >= len(rows.features[label].names))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise no_class(f"{name}, split {rows.split or 'unnamed'}, row {row}", labels[row])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._open(index, self.channels), int(self.targets[index])

    def _open(self, index: int, channels: int) -> Image.Image:
        value = self.rows[index][self.image]
        name = f"{self.name}, row {index}"
        if isinstance(value, Image.Image):
            return to_mode(value, channels)
        data = value["bytes"]
        if data is None:
            try:
                data = Path(value["path"]).read_bytes()
            except (OSError, TypeError) as error:
                raise BadImageError(name, str(error)) from error
        return decode_image(data, name, channels, self.decoder)

    @property
    def first_size(self) -> tuple[int, int]:
        """Width and height of the first image, pixels."""
        return self._open(0, self.channels).size

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


def open_hugging_face(
    name: str, *, download: bool, decoder: Decoder = "pillow"
) -> tuple[HuggingFaceImages, HuggingFaceImages | None, tuple[str, ...]]:
    """Training and evaluation images (or None) and classes of a data set.

    The splits are `train`, and `validation`, `val` or `test`; the columns are found by their
    types: one `Image`, one `ClassLabel`. Code in a data set's repository is never run.

    Args:
        name: a folder that `save_to_disk` wrote, or what `load_dataset` takes: a repository
            (`owner/name`, with `:CONFIGURATION` where there are several) or a local folder.
        download: whether it may be fetched; otherwise it must be in the local cache.
        decoder: as for `senet.data.load_image`.

    Raises:
        UserError: `datasets` is not installed, it is not there, or its columns are others.
    """
    where = f"{PREFIX}{name}"
    train, val = open_splits(where, name, download=download, streaming=False)
    image, label = find_columns(train.features, where)
    classes = tuple(train.features[label].names)
    probe = train[0][image]  # decoded by the library, which tells the mode as it is stored
    channels = 1 if probe.mode in GREY_MODES else 3

    def opened(part: Any) -> HuggingFaceImages:
        return HuggingFaceImages(undecoded(part, image), image, label, where, channels, decoder)

    return opened(train), None if val is None else opened(val), classes


def open_splits(where: str, name: str, *, download: bool, streaming: bool) -> tuple[Any, Any]:
    """The library's own objects of the training split, and of the evaluation split or None.

    Args:
        where: what errors call it.
        name, download: as for `open_hugging_face`.
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
        with _offline(unless=download):
            if (Path(repository) / "dataset_dict.json").exists():
                splits = datasets.load_from_disk(repository)
            else:
                splits = datasets.load_dataset(
                    repository, configuration or None, streaming=streaming
                )
    except Exception as error:  # the library raises many kinds for a name that it cannot open
        remedy = "" if download or os.path.isdir(repository) else "; --download fetches it"  # noqa: PTH112
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot open data {where}: {reason}{remedy}") from error
    train = next((splits[key] for key in _TRAIN if key in splits), None)
    if train is None:
        raise UserError(f"data {where} has no split train, only {', '.join(splits)}")
    return train, next((splits[key] for key in _VAL if key in splits), None)


def no_class(where: str, label: object) -> UserError:
    """The error about an image whose class is none of the data set's."""
    return UserError(
        f"{where} has the class {label}, which is none of the data set's (test splits often keep "
        "theirs secret): use data with labelled train and validation splits"
    )


def find_columns(features: Any, where: str) -> tuple[str, str]:
    """Names of the image column and of the class column, by their types.

    Raises:
        UserError: there is not one of each.
    """
    import datasets

    kinds = features or {}
    images = [key for key, kind in kinds.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(f"{key} ({type(kind).__name__})" for key, kind in kinds.items())
        raise UserError(
            f"data {where} must have one column of images and one of classes (ClassLabel), "
            f"it has {found or 'none that say their type'}"
        )
    return images[0], labels[0]


def undecoded(part: Any, image: str) -> Any:
    """The split with the image column as the files' bytes or paths."""
    import datasets

    return part.cast_column(image, datasets.Image(decode=False))
