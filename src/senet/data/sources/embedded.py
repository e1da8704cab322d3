"""The data set inside the package: a balanced subset of Fashion-MNIST (see its NOTICE)."""

import functools
import hashlib
import lzma
import struct
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
import torch
from torch import Tensor

from senet.data.images import MemoryImages
from senet.errors import SenetError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Of the 10,000 training images; printed by scripts/make_embedded_fashion_mnist.py, tested.
MEAN, STD = 0.286682, 0.354013


# A comparison opens the data for each of its runs, and LZMA takes 0.3 s; 9 MB in all are kept.
_decompressed = functools.lru_cache(maxsize=4)(lzma.decompress)


def _read_checked(folder: Traversable, name: str) -> bytes:
    """The decompressed file, after its SHA-256 has been compared with SHA256SUMS."""
    try:
        sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
        data = (folder / name).read_bytes()
    except OSError as error:
        raise SenetError(
            f"the embedded data set is incomplete ({error}); reinstall senet"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if sums.get(name) != found:
        raise SenetError(
            f"the embedded data set is damaged: {folder / name} has SHA-256 {found}, not "
            f"{sums.get(name)}; reinstall senet"
        )
    return _decompressed(data)


def _read_idx(folder: Traversable, name: str) -> Tensor:
    """An IDX file of unsigned bytes: two zeros, 0x08, rank, big-endian sizes, data."""
    raw = _read_checked(folder, name)
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())


def read_embedded(folder: Traversable | None = None) -> tuple[MemoryImages, MemoryImages]:
    """Read the embedded data set: 10,000 training and 2,000 test images of 28×28, grey.

    Args:
        folder: where its files are; by default inside the package.

    Returns:
        Training and test images, 1,000 and 200 of each of the ten `CLASSES`.

    Raises:
        SenetError: a file is missing, or its SHA-256 is not the one it was made with.
    """
    folder = folder or files("senet.data.sources") / "fashion_mnist"
    train, test = (
        MemoryImages(
            _read_idx(folder, f"{split}-images-idx3-ubyte.xz").unsqueeze(1),
            _read_idx(folder, f"{split}-labels-idx1-ubyte.xz"),
        )
        for split in ("train", "t10k")
    )
    return train, test
