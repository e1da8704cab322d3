"""Writing a data set as tar shards with an index: in parallel, resumed where it was stopped."""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from senet.data.arrays import channel_axis
from senet.data.image_data import ImageData, map_style, only_classes
from senet.data.images import FileImages, ImageSource, MemoryImages
from senet.data.shards.index import INDEX, PLAN, Shard, ShardIndex
from senet.errors import UserError
from senet.support.files import atomic_write, sync_folder

_BLOCK = tarfile.BLOCKSIZE
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LARGEST = 2**62
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_Plan = tuple[str, str, ImageSource, list[int]]
"""A shard to write: its name, its split, and which images of a source."""


def size_in_bytes(text: str) -> int:
    """A size as people write it: `256MB` (10⁶), `1GiB` (2³⁰), `100000`.

    Raises:
        UserError: another form, less than a thousand bytes, or more than 2⁶².
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found.group(2).upper() not in _UNITS:
        raise UserError(f"shard_size must be a size such as 256MB or 1GiB, got {text!r}")
    size = float(found.group(1)) * _UNITS[found.group(2).upper()]
    if size < 1000:
        raise UserError(f"shard_size must be at least 1000 bytes, got {text!r}")
    if size > _LARGEST:
        raise UserError(f"shard_size must be at most {_LARGEST} bytes, got {text!r}")
    return int(size)


@dataclass(frozen=True)
class Sharded:
    """What `write_shards` did.

    Attributes:
        index: of the folder.
        written: shards that this call wrote; the others were there already.
    """

    index: ShardIndex
    written: int


class _Known(NamedTuple):
    """What is known of an image before it is written.

    Attributes:
        size: bytes of its file.
        mark: changes with the image: of a file, with its time.
    """

    size: int
    mark: bytes


def write_shards(
    data: ImageData,
    out: Path,
    *,
    shard_size: int,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[Shard, bool], None] = lambda shard, fresh: None,
) -> Sharded:
    """Write both splits of a data set as shards.

    Image files go in byte by byte; images in memory as PNG, or where they are not 8-bit grey or RGB
    as .npy, without loss. Training images are
    shuffled once, so that each shard holds all classes. A shard is written as a whole or not at
    all; where a former call was stopped, the shards that it finished are kept.

    Args:
        data: from `load_data`.
        out: folder, made if missing; of a former call with the same arguments, or empty.
        shard_size: bytes of a tar file at most (more where one image is larger).
        seed: of the shuffling.
        workers: shards written at a time.
        progress: hears of each shard, and whether it was written now.

    Raises:
        UserError: `out` holds other shards, or an argument out of range.
        OSError: the disk is full; call again to go on.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed}")
    only_classes(data, "shards hold one class an image", "train on the table itself")
    digest = hashlib.sha256(json.dumps([data.name, data.classes]).encode())
    plans = []
    for split, source in (
        ("train", map_style(data.train, "senet shard")),
        ("val", map_style(data.val, "senet shard")),
    ):
        known = [_known(source, index) for index in range(len(source))]
        for number, indices in enumerate(_parts(known, split, shard_size, seed)):
            plans.append((f"{split}-{number:06d}.tar", split, source, indices))
            _take(digest, plans[-1], known)
    _begin(out, digest.hexdigest())

    def one(plan: _Plan) -> tuple[Shard, bool]:
        name, split, source, indices = plan
        finished = _finished(out, name, split)
        if finished is not None:
            return finished, False
        return _write(out, name, split, source, indices), True

    shards, written = [], 0
    with ThreadPoolExecutor(workers) as pool:
        for shard, fresh in pool.map(one, plans):
            shards.append(shard)
            written += fresh
            progress(shard, fresh)
    index = ShardIndex(data.name, data.classes, data.preprocessing, tuple(shards))
    atomic_write(out / INDEX, index.to_json())
    return Sharded(index, written)


def _parts(known: Sequence[_Known], split: str, shard_size: int, seed: int) -> list[list[int]]:
    """The images of each shard, by the sizes of their files."""
    order = list(range(len(known)))
    if split == "train":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(known), generator=generator).tolist()
    parts: list[list[int]] = []
    filled = shard_size
    for index in order:
        # Header and padded content of image and class; a tar ends with up to 20 blocks of zeros.
        content = -(-known[index].size // _BLOCK) * _BLOCK + 3 * _BLOCK
        if filled + content > shard_size - tarfile.RECORDSIZE or not parts:
            parts.append([])
            filled = 0
        parts[-1].append(index)
        filled += content
    return parts


def _known(source: ImageSource, index: int) -> _Known:
    if isinstance(source, FileImages):
        found = Path(source.path(index)).stat()
        return _Known(found.st_size, b"%d %d" % (found.st_size, found.st_mtime_ns))
    if isinstance(source, MemoryImages):
        pixels = source.images[index].numpy().tobytes()
        # A PNG is hardly larger than its pixels.
        return _Known(len(pixels) + 1024, hashlib.sha256(pixels).digest())
    content = _content(source, index)[0]
    return _Known(len(content), hashlib.sha256(content).digest())


def _content(source: ImageSource, index: int) -> tuple[bytes, str]:
    """The file of an image and its ending."""
    if isinstance(source, FileImages):
        path = Path(source.path(index))
        return path.read_bytes(), path.suffix.lower().lstrip(".")
    buffer, image = io.BytesIO(), source[index][0]
    if isinstance(image, Tensor):
        # Channels last, unless they are more than the pixels of a side: as `channel_axis` sees it.
        last = image.permute(1, 2, 0).numpy()
        np.save(buffer, last if channel_axis(last.shape) == 2 else image.numpy())
        return buffer.getvalue(), "npy"
    image.save(buffer, "png")
    return buffer.getvalue(), "png"


def _take(digest: Any, plan: _Plan, known: Sequence[_Known]) -> None:
    """Add a shard to the digest of all that is to be written."""
    name, _, source, indices = plan
    digest.update(name.encode())
    digest.update(source.targets[indices].numpy().tobytes())
    digest.update(json.dumps(indices).encode())
    for index in indices:
        digest.update(known[index].mark)


def _begin(out: Path, fingerprint: str) -> None:
    """Make the folder, or see that it is that of a former call with the same plan."""
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write shards to {out}: it is a file")
    out.mkdir(parents=True, exist_ok=True)
    if (out / PLAN).exists():
        if (out / PLAN).read_text() != json.dumps({"plan": fingerprint}):
            raise UserError(
                f"{out} holds shards of other images, or of another seed or shard size: give "
                "another folder, or remove it"
            )
        return
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no shards of senet: give another folder")
    atomic_write(out / PLAN, json.dumps({"plan": fingerprint}))


def _finished(out: Path, name: str, split: str) -> Shard | None:
    """A shard that a former call wrote: its own index is written last."""
    path = out / name
    beside = path.with_suffix(".json")
    if not beside.exists() or not path.exists():
        return None
    text = beside.read_bytes()
    try:
        values = json.loads(text)
        whole = path.stat().st_size == values["bytes"]
        return _shard(name, split, values, text) if whole else None
    except (ValueError, KeyError, TypeError):
        return None  # cut off or damaged


def _shard(name: str, split: str, values: dict[str, Any], text: bytes) -> Shard:
    return Shard(
        name=name,
        split=split,
        images=len(values["labels"]),
        bytes=values["bytes"],
        sha256=values["sha256"],
        index_sha256=hashlib.sha256(text).hexdigest(),
    )


def _write(out: Path, name: str, split: str, source: ImageSource, indices: list[int]) -> Shard:
    fields: dict[str, list[int]] = {"offsets": [], "sizes": [], "labels": [], "crc32": []}
    descriptor, temporary = tempfile.mkstemp(dir=out, prefix=f".{name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for index in indices:
                    content, ending = _content(source, index)
                    label = int(source.targets[index])
                    _add(tar, f"{index:09d}.{ending}", content)
                    # The content lies before the padding that ends at the tar's position.
                    padded = -(-len(content) // _BLOCK) * _BLOCK
                    fields["offsets"].append(tar.offset - padded)
                    fields["sizes"].append(len(content))
                    fields["labels"].append(label)
                    fields["crc32"].append(zlib.crc32(content))
                    _add(tar, f"{index:09d}.cls", str(label).encode())
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        with Path(temporary).open("rb") as whole:
            sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
        size = Path(temporary).stat().st_size
        Path(temporary).replace(out / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(out)
    values = {"bytes": size, "sha256": sha256, **fields}
    text = json.dumps(values).encode()
    atomic_write((out / name).with_suffix(".json"), text)
    return _shard(name, split, values, text)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without times and owners: equal images give equal shards
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
