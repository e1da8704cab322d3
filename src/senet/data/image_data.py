"""What a data set is to the loaders, and how its images are prepared unless it says otherwise."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from senet.data.arrays import Depth
from senet.data.decoders import Decoder
from senet.data.images import ImageSource
from senet.data.labels import Target, TaskName
from senet.data.probe import SMALL, Kind
from senet.data.samplers import EpochBatchSampler
from senet.data.splits import Split
from senet.data.transforms import Preprocessing
from senet.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE, _IMAGENET_RESIZE = 224, 256


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a data set is to be read, whatever holds it; see `senet.data.load_data`.

    Attributes:
        val_fraction: part of each class set aside, where there is no split of its own.
        image_size: side of the network's input; None: that of the data.
        channels: of the network's input; None: those of the data.
        depth: of its pixels; None: that of the data.
        colours: grey images are for a network for colours, where `channels` is None.
        skip_bad_images: decode all now and leave out the broken ones.
        image_column, label_column: of tables with several; several of labels with commas.
        label_separator: between several labels in a cell; None: found.
        task: what the labels are; None: found.
        split: what is evaluated on; None: the validation images, else the test images.
        whole: where there is no split and no val_fraction, all images are for evaluation.
        classes: names in the order of their numbers, for data without a split of their own; None:
            those of the data, sorted.
        decode: who decodes JPEG.
        seed: of the choice of the images set aside.
        download: whether something may be fetched.
    """

    val_fraction: float | None = None
    image_size: int | None = None
    channels: int | None = None
    depth: Depth | None = None
    colours: bool = False
    skip_bad_images: bool = False
    image_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None
    task: TaskName | None = None
    split: Split | None = None
    whole: bool = False
    classes: tuple[str, ...] | None = None
    decode: Decoder = "pillow"
    seed: int = 0
    download: bool = False

    def as_asked(self, kind: Kind) -> tuple[int, Depth]:
        """Channels and depth for images of a kind."""
        channels = 3 if self.colours and kind.channels == 1 else kind.channels
        return self.channels or channels, self.depth or kind.depth


class KeyBatches(Protocol):
    """Evaluation batches of a rank, as lists of keys."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...


@runtime_checkable
class ImageStream(Protocol):
    """Images that come in an order of their own, instead of being asked for by their number.

    It makes its own batches of keys, each with `epoch`, `step` and `image` as a `Key` has, and
    opens the images of these keys, in whatever process.
    """

    name: str
    """What errors call it."""

    def __len__(self) -> int: ...

    def open(self, key: Any) -> tuple[Any, Target]:
        """The decoded image of a key, and its class."""
        ...

    def train_batches(
        self, batch_size: int, seed: int, rank: int, world_size: int, drop_last: bool
    ) -> EpochBatchSampler:
        """Shuffled batches of a rank, as many on every rank."""
        ...

    def val_batches(self, batch_size: int, rank: int, world_size: int) -> KeyBatches:
        """Batches of a rank; over all ranks each image once."""
        ...


@dataclass(frozen=True)
class ImageData:
    """A data set ready for the loaders.

    Attributes:
        name: what was asked for (`load_data`'s `data`).
        train: training images, a map-style data set of (decoded image, target), or a stream.
        val: evaluation images, likewise.
        classes: name of each class, label or number: of each output of a network.
        preprocessing: how its images become the network's input.
        skipped: one line for each bad image (or shard) that was left out, with path and reason.
        task: what the targets are.
        notes: what was chosen for the user, a line each.
        skipped_val: those of `skipped` that would be evaluation images, or, without a split of
            their own, might be.
    """

    name: str
    train: ImageSource | ImageStream
    val: ImageSource | ImageStream
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    skipped: tuple[str, ...] = ()
    task: TaskName = "classification"
    notes: tuple[str, ...] = ()
    skipped_val: tuple[str, ...] = ()


def preprocessing_for(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], depth: Depth = "8"
) -> Preprocessing:
    """Small images whole; large ones resized in ImageNet's proportion (256 for 224) and cropped."""
    resize = size if size <= SMALL else round(size * _IMAGENET_RESIZE / IMAGENET_SIZE)
    return Preprocessing(
        image_size=size, resize=resize, mean=mean, std=std, channels=len(mean), depth=depth
    )


def natural_preprocessing(size: int, channels: int, depth: Depth = "8") -> Preprocessing:
    """`preprocessing_for` with ImageNet's statistics, of a grey image their mean.

    Of images that are not 8-bit colours they say little: see `is_unmeasured`. Floating-point
    pixels stay as they are.
    """
    if depth == "float":
        return preprocessing_for(size, (0.0,) * channels, (1.0,) * channels, depth)
    return preprocessing_for(size, IMAGENET_MEAN, IMAGENET_STD, depth).with_channels(channels)


def is_other_kind(preprocessing: Preprocessing) -> bool:
    """Whether images are not 8-bit colours, of which ImageNet's statistics say little."""
    return (preprocessing.channels, preprocessing.depth) != (3, "8")


def is_unmeasured(preprocessing: Preprocessing) -> bool:
    """Whether mean and deviation are those of `natural_preprocessing`, and no 8-bit colours."""
    natural = natural_preprocessing(224, preprocessing.channels, preprocessing.depth)
    same = (natural.mean, natural.std) == (preprocessing.mean, preprocessing.std)
    return same and is_other_kind(preprocessing)


def only_classes(data: ImageData, needs: str, instead: str) -> None:
    """Refuse data of another task than one class an image.

    Args:
        data: the data.
        needs: who needs classes and why, for the error.
        instead: what can be done, likewise.

    Raises:
        UserError: they hold labels or numbers.
    """
    if data.task != "classification":
        raise UserError(f"{needs}, {data.name} holds {data.task}: {instead}")


def map_style(source: ImageSource | ImageStream, what: str) -> ImageSource:
    """The source itself, for work that opens images at any place and in any order.

    Args:
        source: a split.
        what: the work, for the error.

    Raises:
        UserError: it is a stream.
    """
    if isinstance(source, ImageStream):
        raise UserError(
            f"{what} opens images in its own order, {source.name} gives them in one only: use "
            "hf:NAME instead of hf-stream:NAME"
        )
    return source
