"""Writing a data set as tar shards with an index: in parallel, resumed where it was stopped."""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """A size as people write it: `256MB` (10⁶), `1GiB` (2³⁰), `100000`.

    Raises:
        UserError: another form, or less than a thousand bytes.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found.group(2).upper() not in _UNITS:
        raise UserError(f"shard_size must be a size such as 256MB or 1GiB, got {text!r}")
    size = int(float(found.group(1)) * _UNITS[found.group(2).upper()])
    if size < 1000:
        raise UserError(f"shard_size must be at least 1000 bytes, got {text!r}")
    return size


@dataclass(frozen=True)
class Sharded:
    """What `write_shards` did.

    Attributes:
        index: of the folder.
        written: shards that this call wrote; the others were there already.
    """

    index: ShardIndex
    written: int


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
    only_classes(data, "shards hold one class an image", "train on the table itself")
    plans = [
        (f"{split}-{number:06d}.tar", split, source, indices)
        for split, source in (
            ("train", map_style(data.train, "senet shard")),
            ("val", map_style(data.val, "senet shard")),
        )
        for number, indices in enumerate(_parts(source, split, shard_size, seed))
    ]
    print_of_plan = _fingerprint(data, plans)
    _begin(out, print_of_plan)

    def one(plan: tuple[str, str, ImageSource, list[int]]) -> tuple[Shard, bool]:
        name, split, source, indices = plan
        known = _finished(out, name, split)
        if known is not None:
            return known, False
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


def _parts(source: ImageSource, split: str, shard_size: int, seed: int) -> list[list[int]]:
    """The images of each shard, by the sizes of their files."""
    order = list(range(len(source)))
    if split == "train":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(source), generator=generator).tolist()
    parts: list[list[int]] = []
    filled = shard_size
    for index in order:
        # Header and padded content of image and class; a tar ends with up to 20 blocks of zeros.
        content = -(-_bytes_of(source, index) // _BLOCK) * _BLOCK + 3 * _BLOCK
        if filled + content > shard_size - tarfile.RECORDSIZE or not parts:
            parts.append([])
            filled = 0
        parts[-1].append(index)
        filled += content
    return parts


def _bytes_of(source: ImageSource, index: int) -> int:
    if isinstance(source, FileImages):
        return Path(source.path(index)).stat().st_size
    if isinstance(source, MemoryImages):
        return source.images[0].nbytes + 1024  # a PNG is hardly larger than its pixels
    return len(_content(source, index)[0])


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


def _fingerprint(data: ImageData, plans: list[tuple[str, str, ImageSource, list[int]]]) -> str:
    digest = hashlib.sha256(json.dumps([data.name, data.classes]).encode())
    for name, _, source, indices in plans:
        digest.update(name.encode())
        digest.update(source.targets[indices].numpy().tobytes())
        digest.update(json.dumps(indices).encode())
    return digest.hexdigest()


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
    values = json.loads(text)
    if path.stat().st_size != values["bytes"]:
        return None
    return _shard(name, split, values, text)


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
