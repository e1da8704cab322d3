"""How fast images are decoded and augmented, by each decoder and number of loader workers.

Every contestant goes through the same files; a turn is one pass over them. Numbers are per worker:
with w workers a pass that takes t seconds counts as t·w/images. The training process itself counts
as one (0 workers), in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from senet.bench.timing import Case, Contestant, Measurement
from senet.data import Augmentation, Decoder, FileImages, ImageData, Preprocessing, train_loader
from senet.data.image_data import IMAGENET_MEAN, IMAGENET_STD
from senet.data.images import read_header
from senet.data.walk import image_files
from senet.errors import UserError

WORKERS = (0, 1, 2)
DECODERS: tuple[Decoder, ...] = ("pillow", "turbo")
COUNT = 192
BATCH = 16
_SIZE = 500, 375  # width and height, pixels: the commonest in ImageNet
_OCTAVES = (3, 60), (12, 36), (48, 16), (190, 7)  # cells across the picture, amplitude
_NOISE = 8.0  # with it, a file has about the 110 kB of ImageNet's training images on average


def write_pictures(folder: Path, count: int = COUNT) -> list[str]:
    """Synthetic photos: soft shapes of several sizes and a little noise, as JPEG of quality 95.

    Args:
        folder: an empty folder.
        count: how many.

    Returns:
        Their paths.
    """
    width, height = _SIZE
    paths = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        picture = np.full((height, width, 3), 128.0)
        for cells, amplitude in _OCTAVES:
            noise = rng.standard_normal((cells * 3 // 4, cells, 3))
            noise += noise.mean(2, keepdims=True)  # colours vary less than brightness
            for channel in range(3):
                small = Image.fromarray(noise[..., channel].astype(np.float32))
                picture[..., channel] += amplitude * np.asarray(
                    small.resize(_SIZE, Image.Resampling.BICUBIC)
                )
        picture += rng.normal(0, _NOISE, (height, width, 1))
        paths.append(str(folder / f"{seed:04}.jpg"))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=95)
    return paths


def find_jpegs(folder: Path) -> list[str]:
    """The first `COUNT` JPEG files below a folder, sorted.

    Raises:
        UserError: there are fewer than a batch.
    """
    files = image_files(folder) if folder.is_dir() else []
    found = [p for p in files if Path(p).suffix.lower() in (".jpg", ".jpeg")]
    if len(found) < BATCH:
        raise UserError(f"{folder} has {len(found)} JPEG files: give a folder with {BATCH} or more")
    return found[: min(len(found), COUNT) // BATCH * BATCH]


def describe(paths: Sequence[str]) -> str:
    """What the files are, in a line."""
    size = sum(Path(path).stat().st_size for path in paths) / len(paths) / 1000
    width, height = read_header(paths[0]).size
    return f"{len(paths)} JPEG files of {size:.0f} kB on average, the first {width}×{height} pixels"


def cases(paths: Sequence[str], workers: Sequence[int] = WORKERS) -> list[Case]:
    """Decoding alone, and decoding with the standard crop and flip at 224 pixels, by workers."""
    if min(workers) < 0:
        raise UserError(f"--workers must be 0 or more, got {tuple(workers)}")
    return [
        Case(
            claim,
            f"{count} workers",
            partial(_contestants, make, paths, count),
            unit="ms/image",
            divisor=len(paths) / max(1, count),
        )
        for claim, make in (("decode", _decoding), ("decode + crop + flip", _training))
        for count in workers
    ]


def _contestants(
    make: Callable[[FileImages, int], Callable[[], object]], paths: Sequence[str], workers: int
) -> list[Contestant]:
    labels = torch.zeros(len(paths), dtype=torch.int64)
    return [
        Contestant(name, make(FileImages(paths, labels, 3, name), workers)) for name in DECODERS
    ]


def _in_one_thread(run: Callable[[], object]) -> Callable[[], object]:
    def alone() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return alone


def _sizes(pairs: Sequence[tuple[Any, int]]) -> list[tuple[int, int]]:
    """What a worker hands over of the decoded images: next to nothing."""
    return [image.size for image, _ in pairs]


def _decoding(source: FileImages, workers: int) -> Callable[[], object]:
    loader: DataLoader[Any] = DataLoader(
        source, BATCH, num_workers=workers, persistent_workers=workers > 0, collate_fn=_sizes
    )
    return _in_one_thread(lambda: sum(len(sizes) for sizes in loader))


def _training(source: FileImages, workers: int) -> Callable[[], object]:
    """The loader of `senet train`: its batches (N,3,224,224) float32 arrive in this process."""
    preprocessing = Preprocessing(image_size=224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    data = ImageData("pictures", source, source, ("all",), preprocessing)
    augmentation = Augmentation(crop="random_resized", flip=True)
    loader = train_loader(data, augmentation, batch_size=BATCH, seed=0, num_workers=workers)
    return _in_one_thread(lambda: sum(len(images) for images, _ in loader))


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """Images a second of each worker: median, best round and spread."""
    lines = []
    for m in measurements:
        q20, q50, q80 = m.quantiles
        lines.append(
            f"{m.benchmark}, {m.case}, {m.contestant}: {1e3 / q50:.0f} images/s a worker (median; "
            f"20 to 80%: {1e3 / q80:.0f} to {1e3 / q20:.0f}; best round {1e3 / m.least:.0f})"
        )
    return lines
