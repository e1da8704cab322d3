"""What the indices of tar shards say: counts, places and checksums, none of it trusted."""

import json
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from senet.data.transforms import Preprocessing
from senet.errors import UserError

INDEX, PLAN, VERSION = "index.json", "plan.json", 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


@dataclass(frozen=True)
class Shard:
    """One tar file of a split, as index.json tells it."""

    name: str
    split: str
    images: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """Name of its own index."""
        return self.name.removesuffix(".tar") + ".json"


@dataclass(frozen=True)
class ShardIndex:
    """What index.json says."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    shards: tuple[Shard, ...]

    def to_json(self) -> str:
        """The file's content."""
        values = {
            "version": VERSION,
            "name": self.name,
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_dict(),
            "shards": [vars(shard) for shard in self.shards],
        }
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "ShardIndex":
        """The inverse of `to_json`, for content that is not trusted.

        Raises:
            UserError: it is no such index, names a file outside its folder, or counts are odd.
        """
        try:
            values = json.loads(text)
            version = values["version"]
            shards = tuple(Shard(**shard) for shard in values["shards"])
            preprocessing = Preprocessing.from_dict(values["preprocessing"])
            index = cls(str(values["name"]), tuple(values["classes"]), preprocessing, shards)
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            raise UserError(
                f"{where} is no index of shards ({type(error).__name__}: {error}); make them "
                "with senet shard"
            ) from error
        if version != VERSION:
            raise UserError(f"{where} has version {version!r}, this senet reads {VERSION}")
        if not index.classes or not all(isinstance(name, str) for name in index.classes):
            raise UserError(f"{where}: classes must be a list of names")
        for shard in shards:
            if not isinstance(shard.name, str) or not _NAME.fullmatch(shard.name):
                raise UserError(
                    f"{where} names {shard.name!r}: a shard is a .tar file in the same folder"
                )
            if shard.split not in ("train", "val"):
                raise UserError(f"{where}: split must be train or val, got {shard.split!r}")
            for count in (shard.images, shard.bytes):
                if type(count) is not int or not 0 < count < 2**62:
                    raise UserError(f"{where}: {shard.name} has count {count!r}")
        return index


@dataclass(frozen=True)
class Table:
    """Where the images of one shard are; every array has one entry an image; None: unknown."""

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.int64] | None

    @classmethod
    def from_json(cls, text: bytes, shard: Shard, classes: int, where: str) -> "Table":
        """Read a shard's own index, which is not trusted.

        Raises:
            UserError: it is no such index, or points outside the shard.
        """
        try:
            values = json.loads(text)
            fields = [np.asarray(values[n]) for n in ("offsets", "sizes", "labels", "crc32")]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where} is no index of a shard ({type(error).__name__})") from error
        for field in fields:
            if field.shape != (shard.images,) or field.dtype.kind != "i":
                raise UserError(
                    f"{where} does not hold {shard.images} whole numbers for each entry"
                )
        table = cls(*(field.astype(np.int64) for field in fields))
        if (
            (table.offsets < 0).any()
            or (table.sizes <= 0).any()
            or (table.offsets > shard.bytes).any()
            or (table.sizes > shard.bytes - table.offsets).any()
        ):
            raise UserError(f"{where} points outside of {shard.name}")
        if (table.labels < 0).any() or (table.labels >= classes).any():
            raise UserError(f"{where} has classes outside 0 to {classes - 1}")
        return table
