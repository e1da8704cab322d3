"""Make the embedded data set (src/senet/data/sources/fashion_mnist) from Debian's Fashion-MNIST.

    apt-get download dataset-fashion-mnist && dpkg-deb --extract dataset-fashion-mnist_*.deb /tmp/fm
    python scripts/make_embedded_fashion_mnist.py /tmp/fm/usr/share/datasets/fashion-mnist

Takes the first 1,000 training and the first 200 test images of each class, in the order of the
original files, and writes them in the original IDX format, compressed by xz (the smallest of xz,
gzip, PNG and lossless WebP: 4.5 MB), together with their SHA-256 sums. Running it again gives the
same files. Prints the mean and standard deviation that senet.data.sources.embedded states.
"""

import argparse
import gzip
import hashlib
import lzma
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

OUT = Path(__file__).parent.parent / "src" / "senet" / "data" / "sources" / "fashion_mnist"
PER_CLASS = {"train": 1000, "t10k": 200}
CLASSES = 10


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzip-compressed IDX file of unsigned bytes: magic 0x08, rank, sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    """The IDX file that holds `array`."""
    header = bytes((0, 0, 0x08, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_xz(path: Path, payload: bytes) -> str:
    """Write `payload` compressed; return the line of SHA256SUMS for it."""
    compressed = lzma.compress(payload, preset=9 | lzma.PRESET_EXTREME)
    path.write_bytes(compressed)
    print(f"{path.name}: {len(compressed):,} bytes")
    return f"{hashlib.sha256(compressed).hexdigest()}  {path.name}\n"


def main() -> None:
    """Read the four original files, choose, write four files and SHA256SUMS."""
    parser = argparse.ArgumentParser(description="make the embedded Fashion-MNIST subset")
    parser.add_argument("source", type=Path, help="folder with train-images-idx3-ubyte.gz, …")
    source: Path = parser.parse_args().source
    OUT.mkdir(parents=True, exist_ok=True)
    sums = []
    for split, per_class in PER_CLASS.items():
        images = read_idx(source / f"{split}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{split}-labels-idx1-ubyte.gz")
        firsts = [np.flatnonzero(labels == label)[:per_class] for label in range(CLASSES)]
        chosen = np.sort(np.concatenate(firsts))
        sums.append(write_xz(OUT / f"{split}-images-idx3-ubyte.xz", idx_bytes(images[chosen])))
        sums.append(write_xz(OUT / f"{split}-labels-idx1-ubyte.xz", idx_bytes(labels[chosen])))
        if split == "train":
            pixels = images[chosen].astype(np.float64) / 255
            print(f"train mean {pixels.mean():.6f}, standard deviation {pixels.std():.6f}")
    (OUT / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
