"""Streams of Hugging Face's library, offline: made here as Parquet files, split, resumed."""

import concurrent.futures.thread
import gc
import io
import itertools
import multiprocessing
import pickle
import threading
import warnings
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from senet.data import (
    Augmentation,
    BadImageError,
    ImageData,
    StreamedImages,
    load_data,
    map_style,
    train_loader,
    val_loader,
)
from senet.data.sources.read_ahead import read_ahead
from senet.data.sources.stream import StreamKey
from senet.errors import SenetError, UserError

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")
SHIFTS = Augmentation(crop="padded", padding=1, flip=True)
FILES = (5, 9, 3, 6)  # training images of each file: uneven
TRAIN, VAL = sum(FILES), 7


def png(number: int, mode: str = "RGB") -> bytes:
    """An image whose first pixel tells its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
    pixels[0, 0] = number
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "png")
    return file.getvalue()


def rows(numbers: Iterable[int], mode: str = "RGB") -> Any:
    numbers = list(numbers)
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["even", "odd"]), "picture": datasets.Image()}
    )
    images = [{"bytes": png(number, mode), "path": None} for number in numbers]
    labels = [number % 2 for number in numbers]
    return datasets.Dataset.from_dict({"picture": images, "label": labels}, features=features)


def card(folder: Path, train: int | None) -> None:
    """What the Hub calls the card: the counts of the splits stand in it."""
    counts = "" if train is None else f"    num_examples: {train}\n"
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n"
        "        names:\n          '0': even\n          '1': odd\n  - name: picture\n"
        "    dtype: image\n  splits:\n  - name: train\n    num_bytes: 1\n"
        f"{counts}  - name: validation\n    num_bytes: 1\n    num_examples: {VAL}\n---\n"
    )


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library sleeps for 5 s behind each stream of interleaved files, for Arrow's sake."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four Parquet files of 23 training images, one of 7 validation images, and a card."""
    place = tmp_path_factory.mktemp("parquet")
    starts = [0, *itertools.accumulate(FILES)]
    for index, (start, count) in enumerate(zip(starts, FILES, strict=False)):
        name = f"train-{index:05d}-of-{len(FILES):05d}.parquet"
        rows(range(start, start + count)).to_parquet(str(place / name))
    rows(range(100, 100 + VAL)).to_parquet(str(place / "validation-00000-of-00001.parquet"))
    card(place, TRAIN)
    return place


def opened(folder: Path, **options: Any) -> ImageData:
    return load_data(f"hf-stream:{folder}", **{"shuffle_buffer": 4, **options})


def make(data: ImageData, augmentation: Augmentation = SHIFTS, **options: Any) -> Any:
    return train_loader(
        data, augmentation, **{"batch_size": 4, "seed": 7, "num_workers": 0, **options}
    )


def collect(loader: Any, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def numbers(data: ImageData, batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    """Which images the batches hold, by their first pixel (not shifted)."""
    mean, std = data.preprocessing.mean[0], data.preprocessing.std[0]
    return [round(float(x[0, 0, 0]) * std * 255 + mean * 255) for b, _ in batches for x in b]


PLAIN = Augmentation()


def test_an_epoch_takes_each_image_once(folder: Path) -> None:
    data = opened(folder)
    assert isinstance(data.train, StreamedImages)
    assert data.classes == ("even", "odd")
    assert (len(data.train), len(data.val)) == (TRAIN, VAL)
    assert data.preprocessing.image_size == 8
    loader = make(data, PLAIN, drop_last=False)
    orders = []
    for epoch in range(3):
        batches = collect(loader, epoch)
        orders.append(numbers(data, batches))
        assert sorted(orders[-1]) == list(range(TRAIN))
        labels = torch.cat([labels for _, labels in batches]).tolist()
        assert labels == [number % 2 for number in orders[-1]]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])
    other = numbers(data, collect(make(data, PLAIN, drop_last=False, seed=8)))
    assert other != orders[0]
    assert len(make(data)) == TRAIN // 4


def test_the_same_images_as_map_style(folder: Path, tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": rows(range(6)), "test": rows(range(100, 103))})
    splits.save_to_disk(str(tmp_path / "saved"))
    plain = load_data(f"hf:{tmp_path / 'saved'}")
    data = opened(tmp_path / "saved")
    assert (len(data.train), len(data.val)) == (6, 3)  # a saved set knows its length
    theirs = collect(val_loader(plain, batch_size=2, num_workers=0))
    assert same(collect(val_loader(data, batch_size=2, num_workers=0)), theirs)
    assert data.preprocessing == plain.preprocessing


@pytest.mark.parametrize("augmentation", [SHIFTS, Augmentation(flip=True, mixup=0.5)])
def test_workers_change_nothing(folder: Path, augmentation: Augmentation) -> None:
    data = opened(folder)
    alone, loader = make(data, augmentation), make(data, augmentation, num_workers=2)
    for epoch in range(2):
        torch.manual_seed(epoch)  # foreign randomness
        assert same(collect(alone, epoch), collect(loader, epoch))


@pytest.mark.parametrize("world_size", [1, 2, 3])  # one stream; whole files; each third image
@pytest.mark.parametrize(("workers", "resumed_with"), [(0, 0), (2, 0), (0, 2)])
def test_resume_in_mid_epoch(
    folder: Path, world_size: int, workers: int, resumed_with: int
) -> None:
    data = opened(folder)
    for rank in range(world_size):
        options = {"batch_size": 2, "rank": rank, "world_size": world_size}
        whole = make(data, num_workers=workers, **options)
        expected = collect(whole, 0) + collect(whole, 1)

        stopped = make(data, num_workers=workers, **options)
        begun = collect(stopped, 0)
        stopped.set_epoch(1)
        batches = iter(stopped)
        begun.append(next(batches))
        state = stopped.state_dict()
        del batches

        resumed = make(opened(folder), num_workers=resumed_with, **options)
        resumed.load_state_dict(state)
        assert resumed.epoch == 1
        assert same(begun + collect(resumed, 1), expected)
        assert same(collect(resumed, 2), collect(whole, 2))


def test_ranks_that_take_every_third_image_share_the_steps_of_one(folder: Path) -> None:
    """And a run may go on with another number of them."""
    data = opened(folder)
    assert not data.train.whole_files(3)
    one = collect(make(data, batch_size=6), 1)
    shared = [collect(make(data, batch_size=2, rank=r, world_size=3), 1) for r in range(3)]
    for step, (images, labels) in enumerate(one):
        parts = [rank[step] for rank in shared]
        assert torch.equal(torch.stack([p[0] for p in parts], 1).flatten(0, 1), images)
        assert torch.equal(torch.stack([p[1] for p in parts], 1).flatten(), labels)
    three = make(data, batch_size=2, rank=0, world_size=3)
    three.set_epoch(1)
    next(iter(three))
    state = three.state_dict()
    loader = make(data, batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.load_state_dict(state)
    assert same(collect(loader, 1), one[1:])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_with_files_of_their_own_take_as_many_steps(
    folder: Path, world_size: int, drop_last: bool
) -> None:
    """Files of 5, 9, 3 and 6 images: short ranks begin again, long ones leave some out."""
    data = opened(folder, shuffle_buffer=30)
    assert data.train.whole_files(world_size)
    seen: set[int] = set()
    for epoch in range(12):
        ranks = [
            collect(
                make(data, PLAIN, batch_size=2, rank=r, world_size=world_size, drop_last=drop_last),
                epoch,
            )
            for r in range(world_size)
        ]
        shapes = [[len(labels) for _, labels in batches] for batches in ranks]
        assert all(shape == shapes[0] for shape in shapes)
        whole = TRAIN // world_size if drop_last else -(-TRAIN // world_size)
        assert sum(shapes[0]) == (whole // 2 * 2 if drop_last else whole)
        orders = [set(numbers(data, batches)) for batches in ranks]
        assert not set.intersection(*orders)
        seen |= set.union(*orders)
    assert seen == set(range(TRAIN))  # what one epoch leaves out comes in another


def test_another_number_of_ranks_within_an_epoch_is_said(folder: Path) -> None:
    data = opened(folder)
    two = make(data, batch_size=2, rank=0, world_size=2)
    next(iter(two))
    loader = make(data, batch_size=4)
    with pytest.warns(UserWarning, match="another number of processes: in the rest of this epoch"):
        loader.load_state_dict(two.state_dict())
    state = loader.state_dict()
    with pytest.warns(UserWarning, match=r"datasets 1\.0 may shuffle otherwise"):
        loader.load_state_dict(state | {"datasets": "1.0"})
    with pytest.raises(UserError, match="made with shuffle_buffer 4, now it is 5"):
        make(opened(folder, shuffle_buffer=5)).load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_each_image_once(folder: Path, world_size: int, workers: int) -> None:
    data = opened(folder)
    found: list[int] = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "num_workers": workers}
        loader = val_loader(data, batch_size=2, **options)
        first = collect(loader)
        assert same(first, collect(loader))
        found += numbers(data, first)
    assert sorted(found) == list(range(100, 100 + VAL))


def test_each_rank_reads_its_stream_once_whatever_the_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = multiprocessing.Value("i", 0)
    original = StreamedImages._row

    def counted(self: StreamedImages, row: Any) -> Any:
        with read.get_lock():
            read.value += 1
        return original(self, row)

    data = opened(folder)
    monkeypatch.setattr(StreamedImages, "_row", counted)
    collect(make(data, num_workers=2))
    assert read.value <= TRAIN


def test_the_size_of_an_epoch(folder: Path, tmp_path: Path) -> None:
    short = opened(folder, epoch_size=10)
    first = numbers(short, collect(make(short, PLAIN, batch_size=5), 0))
    assert len(first) == len(set(first)) == 10
    assert set(first) != set(numbers(short, collect(make(short, PLAIN, batch_size=5), 1)))
    long = opened(folder, epoch_size=40)  # more than there are: begun again
    counts = np.bincount(numbers(long, collect(make(long, PLAIN, batch_size=10))))
    assert (counts.min(), counts.max(), counts.sum()) == (1, 2, 40)

    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.glob("*.parquet"):
        (bare / path.name).write_bytes(path.read_bytes())
    unknown = opened(bare)
    assert len(unknown.val) == VAL  # counted
    assert len(collect(val_loader(unknown, batch_size=7, num_workers=0))) == 1
    with pytest.raises(UserError, match=r"hf-stream:.*bare does not say .* give --epoch-size N"):
        make(unknown)
    assert len(make(opened(bare, epoch_size=8))) == 2


def test_grey_and_files(tmp_path: Path) -> None:
    """A folder of image files: rows are paths, read where they are decoded."""
    for split in ("train", "test"):
        for number in range(6):
            path = tmp_path / split / ("even", "odd")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number, "L"))
    data = opened(tmp_path, epoch_size=6)
    assert data.preprocessing.channels == 1
    order = numbers(data, collect(make(data, PLAIN, batch_size=2, num_workers=2)))
    assert sorted(order) == list(range(6))
    (tmp_path / "train/odd/3.png").unlink()
    with pytest.raises(BadImageError, match=r"image \d of epoch 1, .*odd/3.png': No such file"):
        collect(make(data, PLAIN, batch_size=2))


def test_an_address_is_read_where_the_stream_is(folder: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/1.png", png(1))
    source = opened(folder).train
    assert isinstance(source, StreamedImages)
    path = f"zip://a/1.png::{tmp_path / 'images.zip'}"
    row = source._row({"picture": {"bytes": None, "path": path}, "label": 1})
    assert row.content == png(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_and_a_broken_file_are_named(tmp_path: Path, workers: int) -> None:
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    contents = [png(0), png(1), b"none"]
    bad = datasets.Dataset.from_dict(
        {"picture": [{"bytes": c, "path": None} for c in contents], "label": [0, 1, 0]},
        features=features,
    )
    datasets.DatasetDict({"train": bad, "test": bad}).save_to_disk(str(tmp_path / "saved"))
    data = opened(tmp_path / "saved")
    with pytest.raises(BadImageError, match=r"saved, image \d of epoch 1': not an image"):
        collect(make(data, PLAIN, batch_size=3, num_workers=workers))
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    for split in ("train", "test"):
        rows(range(6)).to_parquet(str(parquet / f"{split}.parquet"))
    data = opened(parquet, epoch_size=6)
    content = (parquet / "train.parquet").read_bytes()
    (parquet / "train.parquet").write_bytes(content[:100] + bytes(len(content) - 100))
    with pytest.raises(SenetError, match=r"cannot read hf-stream:.*parquet any further: "):
        collect(make(data, PLAIN, batch_size=3, num_workers=workers))


@pytest.mark.parametrize("secret", [-1, None])
def test_images_without_a_class_are_refused(tmp_path: Path, secret: int | None) -> None:
    features = rows([0]).features
    images = [{"bytes": png(number), "path": None} for number in range(3)]
    columns = {"picture": images, "label": [0, 1, secret]}
    hidden = datasets.Dataset.from_dict(columns, features=features)
    splits = datasets.DatasetDict({"train": rows(range(4)), "test": hidden})
    splits.save_to_disk(str(tmp_path))
    message = f"split .*, row 2 has the class {secret}, which is none of"
    with pytest.raises(UserError, match=message):
        load_data(f"hf:{tmp_path}")
    data = opened(tmp_path)
    with pytest.raises(UserError, match=f"has the class {secret}, which is none of"):
        collect(val_loader(data, batch_size=3, num_workers=0))


def test_what_does_not_belong(folder: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"val_fraction": 0.5}, "val_fraction is not for hf-stream:"),
        ({"skip_bad_images": True}, "skip_bad_images is not for hf-stream:"),
        ({"bad_shards": "skip"}, "bad_shards is not for hf-stream:"),
        ({"epoch_size": 0}, "epoch_size must be at least 1 image, got 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1 image, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            opened(folder, **options)
    with pytest.raises(UserError, match="epoch_size is for hf-stream:NAME, not for embedded"):
        load_data("embedded", epoch_size=5)
    with pytest.raises(UserError, match=r"cannot open data hf-stream:nobody/nothing: .*--download"):
        load_data("hf-stream:nobody/nothing")
    for prefix in ("hf:", "hf-stream:"):
        with pytest.raises(UserError, match=f"data {prefix} lacks a name: give {prefix}NAME"):
            load_data(prefix)
    with pytest.raises(UserError, match=r"opens images in its own order.*use hf:NAME"):
        map_style(opened(folder).train, "this")
    rows(range(4)).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match=r"a stream is not divided: use hf:.* with --val-fraction"):
        opened(tmp_path)


def test_workers_get_no_stream(folder: Path) -> None:
    """Where workers are not forked, the source is pickled for them."""
    source = opened(folder).train
    assert isinstance(source, StreamedImages)
    row = next(source.rows())
    copy = pickle.loads(pickle.dumps(source))
    assert copy.stream is None
    image, label = copy.open(StreamKey(0, 0, 0, row))
    assert (image.getpixel((0, 0)), label) == ((0, 0, 0), 0)


def test_abandoned_epochs_leave_no_threads(folder: Path) -> None:
    def readers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("stream")]

    loader = make(opened(folder))
    for thread in readers():
        thread.join()  # of the tests before
    for _ in range(3):
        next(iter(loader))
    del loader
    gc.collect()
    for thread in readers():
        thread.join(timeout=30)
    assert not readers()


def test_a_stream_is_left_alone_in_the_middle_of_anything() -> None:
    """The garbage collector may close it while this thread holds the lock of all executors."""
    closed = threading.Event()

    def batches() -> Generator[list[StreamKey], None, None]:
        try:
            while True:
                yield []
        finally:
            closed.set()

    reading = read_ahead(batches())
    assert next(reading) == []

    def leave() -> None:
        with concurrent.futures.thread._global_shutdown_lock:  # type: ignore[attr-defined]
            reading.close()  # type: ignore[attr-defined]

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(20)
    assert not leaving.is_alive()
    assert closed.wait(20)
