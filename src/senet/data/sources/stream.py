"""Streams of Hugging Face's `datasets`: `load_dataset(…, streaming=True)`, resumed exactly.

The library shuffles (`IterableDataset.shuffle`: the order of the files, and a buffer of images),
and splits among ranks (`split_dataset_by_node`: whole files where their number is a multiple of
the ranks', otherwise every rank reads all and takes each world_size-th image). A rank reads its
stream once, ahead of the training in a thread of the main process; loader workers share out the
decoding, batch by batch. So a batch is a function of (seed, epoch, step), whatever the number of
workers; and a resumed run reads its epoch again from the start, without decoding, up to its place:
the library's own `state_dict` forgets what the shuffle buffer held.
"""

import itertools
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from senet.data.arrays import Depth, Header
from senet.data.decoders import Decoder
from senet.data.image_data import IMAGENET_SIZE, ImageData, Reading, natural_preprocessing
from senet.data.images import BadImageError, decode_image, read_header
from senet.data.probe import kind_of
from senet.data.samplers import EpochBatchSampler
from senet.data.sources.hugging_face import (
    Labels,
    content_of,
    find_columns,
    find_labels,
    no_class,
    open_splits,
    undecoded,
)
from senet.data.sources.read_ahead import read_ahead
from senet.errors import SenetError, UserError

PREFIX = "hf-stream:"
_FILES_PROBED, _ROWS_PROBED = 16, 64
SHUFFLE_BUFFER = 1000
"""Images in the shuffle buffer, the library's own default; they are held as files, undecoded."""


class Row(NamedTuple):
    """One image as the stream holds it."""

    label: int
    content: bytes | None
    path: str | None


class StreamKey(NamedTuple):
    """What `Key` is to a map-style data set; `image` counts all ranks' images of the epoch."""

    epoch: int
    step: int
    image: int
    row: Row


class StreamedImages:
    """One split of a data set, read in the order that it comes in.

    Args:
        rows: a `datasets.IterableDataset`; its image column is left undecoded.
        image: name of the image column.
        label: name of the class column.
        labels: its classes.
        name: what errors call it.
        channels: as for `senet.data.load_image`.
        images: how many there are, or how many make an epoch; None: not known.
        buffer: images in the shuffle buffer.
        decoder: as for `senet.data.load_image`; `depth` likewise, set later.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        label: str,
        labels: Labels,
        name: str,
        channels: int,
        images: int | None,
        buffer: int = SHUFFLE_BUFFER,
        decoder: Decoder = "pillow",
    ) -> None:
        self.stream, self.image, self.label, self.name = rows, image, label, name
        self.channels, self.images, self.buffer = channels, images, buffer
        self.decoder = decoder
        self.depth: Depth = "8"
        self.labels = labels
        self.guessed = False  # grey, as the first images of some files are

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stream": None}  # loader workers decode, they do not read

    def __len__(self) -> int:
        """Images of an epoch.

        Raises:
            UserError: it is not known.
        """
        if self.images is None:
            raise UserError(
                f"{self.name} does not say how many images its split train has (num_examples): "
                "give --epoch-size N, the images of an epoch"
            )
        return self.images

    def whole_files(self, world_size: int) -> bool:
        """Whether ranks read whole files of their own, instead of each world_size-th image."""
        return world_size > 1 and self.stream.num_shards % world_size == 0

    def train_batches(
        self, batch_size: int, seed: int, rank: int, world_size: int, drop_last: bool
    ) -> "StreamedBatchSampler":
        """See `senet.data.image_data.ImageStream`."""
        return StreamedBatchSampler(self, batch_size, seed, rank, world_size, drop_last)

    def val_batches(self, batch_size: int, rank: int, world_size: int) -> "StreamBatches":
        """See `senet.data.image_data.ImageStream`."""
        return StreamBatches(self, batch_size, rank, world_size)

    def rows(
        self, *, rank: int = 0, world_size: int = 1, seed: int | None = None, epoch: int = 0
    ) -> Iterator[Row]:
        """A rank's part of the stream, once through it.

        Args:
            rank: whose part.
            world_size: of how many.
            seed: of the shuffling; None: in the order of the files.
            epoch: each has its own order.

        Raises:
            UserError: an image has no class.
            SenetError: it cannot be read any further.
        """
        from datasets.distributed import split_dataset_by_node

        try:
            stream = self.stream
            if seed is not None:
                stream = stream.shuffle(seed=seed, buffer_size=self.buffer)
            if world_size > 1:
                stream = split_dataset_by_node(stream, rank=rank, world_size=world_size)
            stream.set_epoch(epoch)  # behind the split, which forgets it
            for row in stream:
                yield self._row(row)
        except SenetError:
            raise
        except Exception as error:  # of the network, the file system, Arrow, a damaged file
            reason = str(error).splitlines()[0] if str(error) else ""
            raise SenetError(
                f"cannot read {self.name} any further: {type(error).__name__} {reason}"
            ) from error

    def _row(self, row: Mapping[str, Any]) -> Row:
        value, label = row[self.image], self.labels.number(row[self.label])
        if label < 0:
            where = f"{self.name}, split {self.stream.split or 'unnamed'}"
            raise no_class(where, row[self.label])
        if value is None:
            return Row(label, b"", None)  # an error when it is opened, as for an empty file
        if isinstance(value, bytes):
            return Row(label, value, None)
        content, path = value["bytes"], value["path"]
        if content is None and path is not None and "://" in path:
            from datasets.utils.file_utils import xopen  # addresses, members of archives

            with xopen(path, "rb") as file:
                content = file.read()
        return Row(label, content, path)

    def open(self, key: StreamKey) -> tuple[Any, int]:
        """The decoded image of a key, and its class.

        Raises:
            BadImageError: it cannot be decoded; names its place in the epoch, and its file.
        """
        content, path = key.row.content, key.row.path
        where = f"{self.name}, image {key.image} of epoch {key.epoch + 1}"
        name = where if path is None else f"{where}, {path}"
        if content is None:
            try:
                content = Path(path or "").read_bytes()
            except OSError as error:
                raise BadImageError(name, error.strerror or str(error)) from error
        if not content:
            raise BadImageError(name, "the file is empty")
        if self.guessed and not read_header(content, name).grey:
            warnings.warn(
                f"{self.name} was taken as grey, as the first images of its files are, but {name} "
                "is not: --channels 3 keeps the colours",
                stacklevel=2,
            )
            self.guessed = False
        decoded = decode_image(content, name, self.channels, self.decoder, self.depth)
        return decoded, key.row.label

    def headers(self) -> Iterator[Header]:
        """Of the first images of several files; a broken one is named when it is used."""
        found = False
        files = min(self.stream.num_shards, _FILES_PROBED)
        for index in range(files):
            part = self.stream.shard(num_shards=files, index=index)
            for row in itertools.islice(part, _ROWS_PROBED):
                found = True
                picture = self._row(row)
                try:
                    value = {"bytes": picture.content, "path": picture.path}
                    yield read_header(content_of(value, self.name), self.name)
                except BadImageError:
                    continue
        if not found:
            raise UserError(f"{self.name} has no images in its split train")


def load_stream(
    data: str, reading: Reading, *, epoch_size: int | None = None, buffer: int | None = None
) -> ImageData:
    """`senet.data.load_data` for hf-stream:NAME, NAME as for `load_hugging_face`.

    With `reading.download` it may be read over the network, each epoch anew.

    Args:
        data: with the prefix.
        reading: how it is read.
        epoch_size: training images of an epoch; None: what the data set's card or
            `save_to_disk` says (num_examples), all of them.
        buffer: images in the shuffle buffer; None: 1000.

    Raises:
        UserError: as for `load_hugging_face`, or there is no evaluation split.
        SenetError: it is there but cannot be read.
    """
    for option, value in (("epoch_size", epoch_size), ("shuffle_buffer", buffer)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1 image, got {value}")
    name = data.removeprefix(PREFIX)
    parts = open_splits(data, name, reading, streaming=True)
    if parts[1] is None:
        raise UserError(
            f"{data} has no split validation, val or test, and a stream is not divided: use "
            f"hf:{name} with --val-fraction"
        )
    image, columns = find_columns(parts[0].features, data, reading)
    if len(columns) > 1:
        raise UserError(
            f"{data} takes one column of classes; {', '.join(columns)} as labels or numbers are "
            f"read by hf:{name}"
        )
    label = columns[0]
    own = None if parts[0] is not parts[1] else reading.classes
    labels = find_labels(parts[0], label, data, replace(reading, classes=own))
    train, val = (
        StreamedImages(
            undecoded(rows, image),
            image,
            label,
            labels,
            data,
            reading.channels or 3,
            count,
            buffer or SHUFFLE_BUFFER,
            reading.decode,
        )
        for rows, count in map(_stream_and_count, parts)
    )
    if epoch_size is not None:
        train.images = epoch_size
    if val.images is None:  # evaluation takes all of them: counted, by their classes alone
        classes_only = val.stream.select_columns([label])
        val.images = sum(1 for _ in classes_only)
    if val.images == 0:
        raise UserError(f"{data} has no images in its split validation")
    kind = kind_of(train.headers(), reading.channels)
    channels, depth = reading.as_asked(kind)
    for stream in (train, val):
        stream.channels, stream.depth = channels, depth
        stream.guessed = reading.channels is None and channels == 1
    size = reading.image_size or kind.side or IMAGENET_SIZE
    preprocessing = natural_preprocessing(size, channels, depth)
    return ImageData(data, train, val, labels.names, preprocessing)


def _stream_and_count(part: Any) -> tuple[Any, int | None]:
    """A split as a stream, and how many images it has, if it says so."""
    import datasets

    if isinstance(part, datasets.Dataset):  # of save_to_disk
        return part.to_iterable_dataset(num_shards=max(1, len(part.cache_files))), len(part)
    known = (part.info.splits or {}).get(str(part.split))
    return part, known.num_examples or None if known is not None else None


class StreamedBatchSampler(EpochBatchSampler):
    """Batches of a stream, as many on every rank, whatever files a rank was given.

    Where ranks take each world_size-th image, each comes once. A rank with files of its own begins
    them again if they run out before the epoch ends, and leaves out what they hold beyond it. With
    files of equal length that is nothing; of uneven ones it is what comes last, which differs from
    epoch to epoch by the order of the files and the shuffle buffer.
    """

    def __init__(
        self,
        source: StreamedImages,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        super().__init__(len(source), batch_size, seed, rank, world_size, drop_last)
        self.source = source

    def facts(self) -> dict[str, Any]:
        """What the order depends on beside the seed."""
        import datasets

        return {
            "shuffle_buffer": self.source.buffer,
            "whole_files": self.source.whole_files(self.world_size),
            "datasets": datasets.__version__,
        }

    def check_facts(self, state: Mapping[str, Any]) -> None:
        """Refuse another shuffle buffer; warn where the images of this epoch will be others."""
        now = self.facts()
        if state.get("shuffle_buffer") != now["shuffle_buffer"]:
            raise UserError(
                f"the checkpoint was made with shuffle_buffer {state.get('shuffle_buffer')}, now "
                f"it is {now['shuffle_buffer']}: resume with the same"
            )
        reason = None
        if state["world_size"] != self.world_size and (state["whole_files"] or now["whole_files"]):
            reason = "files are shared out among another number of processes"
        elif state["datasets"] != now["datasets"]:
            reason = f"datasets {state['datasets']} may shuffle otherwise than {now['datasets']}"
        if reason is not None:
            warnings.warn(
                f"{self.source.name}: {reason}: in the rest of this epoch some images come a "
                "second time and others not at all",
                stacklevel=3,
            )

    def _batches(self, epoch: int, start: int) -> Iterator[list[StreamKey]]:  # type: ignore[override]
        return read_ahead(self._read(epoch, start), len(self) - start)

    def _read(self, epoch: int, start: int) -> Generator[list[StreamKey], None, None]:
        together, world_size = self.batch_size * self.world_size, self.world_size
        rows = itertools.islice(self._endless(epoch), start * self.batch_size, None)
        for step in range(start, len(self)):
            first = step * together
            # The last step may be smaller, but is as large on each rank.
            size = -(-(min(first + together, self.n) - first) // world_size)
            yield [
                StreamKey(epoch, step, first + place * world_size + self.rank, row)
                for place, row in enumerate(itertools.islice(rows, size))
            ]

    def _endless(self, epoch: int) -> Iterator[Row]:
        while True:
            found = False
            for row in self.source.rows(
                rank=self.rank, world_size=self.world_size, seed=self.seed, epoch=epoch
            ):
                found = True
                yield row
            if not found:
                raise UserError(f"{self.source.name} has no images for rank {self.rank}")


class StreamBatches:
    """Evaluation batches of a rank: over all ranks each image once."""

    def __init__(self, source: StreamedImages, batch_size: int, rank: int, world_size: int) -> None:
        self.source, self.batch_size = source, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """About as many; exactly on one rank."""
        return -(-len(self.source) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[StreamKey]]:
        return read_ahead(self._read())

    def _read(self) -> Generator[list[StreamKey], None, None]:
        rows = self.source.rows(rank=self.rank, world_size=self.world_size)
        for step in itertools.count():
            part = list(itertools.islice(rows, self.batch_size))
            if not part:
                return
            first = step * self.batch_size
            places = range(first, first + len(part))
            yield [
                StreamKey(0, step, place * self.world_size + self.rank, row)
                for place, row in zip(places, part, strict=True)
            ]
