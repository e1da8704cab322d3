"""Images in tar shards (WebDataset's layout) with an index: read in long runs, resumed exactly.

A folder of shards, as `senet shard` makes it, holds `train-000000.tar`, …, `val-000000.tar`, …,
beside each its index (`train-000000.json`: place, size, class and CRC-32 of each image), and
`index.json`: classes, preprocessing, and the size and SHA-256 of each file. The order of an epoch
is computed from these counts alone, so that every rank and every resumed run knows it without
reading anything. Members are read at their place and never unpacked: names in a shard are not used.
"""

import difflib
import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from senet.data.arrays import Depth
from senet.data.decoders import Decoder
from senet.data.images import BadImageError, decode_image
from senet.data.shards.index import INDEX, Shard, ShardIndex, Table
from senet.errors import UserError

PREFIX = "shards:"
SHUFFLE_BUFFER = 10_000
BadShards = Literal["fail", "skip"]
_OPEN_FILES = 32
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_INDEX_LIMIT = 2**28  # bytes of a JSON file that are read at most


class ShardImages(Dataset[tuple[Any, int]]):
    """The images of some shards, each read at its place in its tar file.

    Args:
        place: where the shards are.
        shards: those of one split.
        tables: one for each of them.
        channels: as for `load_image`.
        buffer: images within which the order of an epoch is shuffled, see `epoch_order`.
        decoder, depth: as for `load_image`.

    Raises:
        BadImageError: on access, names shard and image: cut short, changed or no image.
    """

    def __init__(
        self,
        place: "Place",
        shards: Sequence[Shard],
        tables: Sequence[Table],
        channels: int,
        buffer: int,
        decoder: Decoder = "pillow",
        depth: Depth = "8",
    ) -> None:
        self.place = place
        self.shards = tuple(shards)
        self.channels = channels
        self.buffer = buffer
        self.decoder, self.depth = decoder, depth
        counts = np.array([shard.images for shard in shards], dtype=np.int64)
        self.starts = np.concatenate(([0], np.cumsum(counts)))
        self.offsets = np.concatenate([table.offsets for table in tables])
        self.sizes = np.concatenate([table.sizes for table in tables])
        sums = [table.crc32 for table in tables if table.crc32 is not None]
        self.crc32 = np.concatenate(sums) if len(sums) == len(tables) else None
        self.targets: Tensor = torch.from_numpy(np.concatenate([t.labels for t in tables]))
        self.chosen: npt.NDArray[np.int64] | None = None  # of a subset
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # descriptors do not travel

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name, data = self.content(index)
        decoded = decode_image(data, name, self.channels, self.decoder, self.depth)
        return decoded, int(self.targets[index])

    def content(self, index: int) -> tuple[str, bytes]:
        """What errors call an image, and its file.

        Raises:
            BadImageError: it cannot be read whole.
        """
        if self.chosen is not None:
            index = int(self.chosen[index])
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        name = f"{self.place.text(self.shards[number].name)}: image {index - self.starts[number]}"
        size = int(self.sizes[index])
        try:
            data = os.pread(self._file(number), size, int(self.offsets[index]))
        except OSError as error:
            raise BadImageError(name, error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImageError(name, "the shard is cut short")
        if self.crc32 is not None and zlib.crc32(data) != self.crc32[index]:
            raise BadImageError(name, "the shard is damaged here (its CRC-32 differs)")
        return name, data

    def _file(self, number: int) -> int:
        """Descriptor of a shard's file; the files used last stay open."""
        descriptor = self._files.pop(number, None)
        if descriptor is None:
            descriptor = os.open(self.place.file(self.shards[number]), os.O_RDONLY)
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files[number] = descriptor
        return descriptor

    def epoch_order(self, generator: torch.Generator) -> Tensor:
        """A random order that reads a few shards at a time: (N,) indices, each once.

        The shards are shuffled, their images strung together, and shuffled within stretches of
        `buffer` images: what a shuffle buffer gives that is filled and emptied in turn.
        """
        if self.chosen is not None or self.buffer >= len(self):
            return torch.randperm(len(self), generator=generator)
        parts = [
            torch.arange(int(self.starts[number]), int(self.starts[number + 1]))
            for number in torch.randperm(len(self.shards), generator=generator).tolist()
        ]
        line = torch.cat(parts)
        for start in range(0, len(line), self.buffer):
            stretch = line[start : start + self.buffer]
            mixed = torch.randperm(len(stretch), generator=generator)
            line[start : start + self.buffer] = stretch[mixed]
        return line

    def subset(self, indices: Sequence[int]) -> "ShardImages":
        """The data set of these images, in this order."""
        other = ShardImages.__new__(ShardImages)
        other.__dict__.update(self.__getstate__())
        picked = np.asarray(indices, dtype=np.int64)
        other.targets = self.targets[torch.from_numpy(picked)]
        other.chosen = picked if self.chosen is None else self.chosen[picked]
        return other


class Place:
    """A folder of shards, here or behind an http(s) address.

    Files of an address are fetched when they are first used, checked against their SHA-256, and
    kept in `cache`; processes that want the same one wait for the first of them.

    Args:
        base: folder or address.
        cache: folder for what is fetched.
    """

    def __init__(self, base: str, cache: Path) -> None:
        self.base = base.rstrip("/")
        self.remote = base.startswith(("http://", "https://"))
        digest = hashlib.sha256(self.base.encode()).hexdigest()[:16]
        self.folder = cache / "shards" / digest if self.remote else Path(base)

    def text(self, name: str) -> str:
        """Name of a file, for messages."""
        return f"{self.base}/{name}"

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """A small file, checked against a SHA-256 if one is known.

        Raises:
            UserError: it is missing, or not the one that index.json means.
        """
        try:
            if self.remote:
                with urllib.request.urlopen(self.text(name), timeout=60) as answer:
                    data: bytes = answer.read(_INDEX_LIMIT + 1)
            else:
                with (self.folder / name).open("rb") as file:
                    data = file.read(_INDEX_LIMIT + 1)
        except OSError as error:  # URLError is one
            why = error.strerror or str(error)
            raise UserError(f"cannot read {self.text(name)}: {why}") from error
        if len(data) > _INDEX_LIMIT:
            raise UserError(f"{self.text(name)} is larger than {_INDEX_LIMIT >> 20} MiB")
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{self.text(name)} is not the file that {INDEX} means (SHA-256)")
        return data

    def file(self, shard: Shard) -> Path:
        """The shard's tar file on this machine.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.folder / shard.name
        if not self.remote or (path.exists() and path.stat().st_size == shard.bytes):
            return path
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{shard.name}.lock").open("w") as turn:
            fcntl.lockf(turn, fcntl.LOCK_EX)
            if not path.exists() or path.stat().st_size != shard.bytes:
                self._fetch(shard, path)
        return path

    def _fetch(self, shard: Shard, path: Path) -> None:
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=f".{shard.name}.")
        try:
            with (
                os.fdopen(descriptor, "wb") as file,
                urllib.request.urlopen(self.text(shard.name), timeout=60) as answer,
            ):
                shutil.copyfileobj(answer, file)
            if (why := defect(Path(name), shard, whole=True)) is not None:
                raise OSError(f"{self.text(shard.name)}: {why}")
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


def defect(path: Path, shard: Shard, *, whole: bool) -> str | None:
    """What is wrong with a shard's file, or None: its size, and with `whole` its SHA-256."""
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"it has {size} bytes instead of {shard.bytes}"
        if whole:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    return "it does not match its SHA-256"
    except OSError as error:
        return error.strerror or str(error)
    return None


def open_shards(
    spec: str,
    *,
    cache: Path,
    buffer: int | None = None,
    bad: BadShards | None = None,
    decoder: Decoder = "pillow",
) -> tuple[ShardIndex, ShardImages, ShardImages, tuple[str, ...], tuple[str, ...]]:
    """Open what `shards:SPEC` means.

    Args:
        spec: folder or http(s) address with index.json; or such a place and a name with a range in
            braces, `/data/train-{000000..000099}.tar`, for some of its training shards.
        cache: folder for fetched shards.
        buffer: images within which an epoch is shuffled; None: 10,000.
        bad: "fail" (None) checks that every file is there with its size; "skip" reads them all,
            compares their SHA-256, names the broken ones and leaves them out.
        decoder: as for `load_image`.

    Returns:
        The index, training and evaluation images, a line for each shard that was left out, and
        those of these lines that are of evaluation images.

    Raises:
        UserError: no index, a broken shard (named), or none that is whole.
    """
    if bad is not None and bad not in get_args(BadShards):
        raise UserError(f"bad_shards must be one of {', '.join(get_args(BadShards))}, got {bad!r}")
    buffer = SHUFFLE_BUFFER if buffer is None else buffer
    if buffer < 1:
        raise UserError(f"shuffle_buffer must be at least 1 image, got {buffer}")
    base, _, last = spec.rpartition("/")
    pattern = last if last.endswith(".tar") else None
    place = Place((base or ".") if pattern else spec, cache)
    index = ShardIndex.from_json(place.read(INDEX), place.text(INDEX))
    shards = _chosen(index, pattern, spec)
    good, skipped, skipped_val = [], [], []
    for shard in shards:
        path = place.folder / shard.name
        if place.remote and not path.exists():
            why = None  # checked when it is fetched
        else:
            why = defect(path, shard, whole=bad == "skip")
        if why is None:
            good.append(shard)
        elif bad == "skip":
            skipped.append(f"broken shard {place.text(shard.name)}: {why}")
            if shard.split == "val":
                skipped_val.append(skipped[-1])
            warnings.warn(f"{skipped[-1]}: it is left out", stacklevel=2)
        else:
            raise UserError(
                f"broken shard {place.text(shard.name)}: {why}; make it again with senet shard, "
                "or leave such shards out with --bad-shards skip"
            )
    splits = []
    for split in ("train", "val"):
        own = [shard for shard in good if shard.split == split]
        if not own:
            raise UserError(f"{spec} has no whole {split} shards")
        tables = []
        for shard in own:
            content = place.read(shard.index_name, shard.index_sha256)
            where = place.text(shard.index_name)
            tables.append(Table.from_json(content, shard, len(index.classes), where))
        channels, depth = index.preprocessing.channels, index.preprocessing.depth
        splits.append(ShardImages(place, own, tables, channels, buffer, decoder, depth))
    return index, splits[0], splits[1], tuple(skipped), tuple(skipped_val)


def shard_names(pattern: str, spec: str) -> list[str]:
    """The names that a name with a range in braces means.

    Args:
        pattern: such as `train-{000000..000099}.tar`.
        spec: what errors call it.

    Raises:
        UserError: the range falls, or is enormous.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < 10**6:
        raise UserError(f"data {spec}: {found.group()} must rise, by less than a million")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [f"{head}{n:0{len(first)}}{tail}" for n in range(int(first), int(last) + 1)]


def _chosen(index: ShardIndex, pattern: str | None, spec: str) -> list[Shard]:
    """All shards, or the training shards that a name with braces means and those of val."""
    if pattern is None:
        return list(index.shards)
    names = shard_names(pattern, spec)
    known = {shard.name: shard for shard in index.shards if shard.split == "train"}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"data {spec}: the index has no training shard {name!r}{hint}")
    return [
        *(known[name] for name in names),
        *(shard for shard in index.shards if shard.split == "val"),
    ]
