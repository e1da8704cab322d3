"""Batches are a function of (seed, epoch, step): not of workers, resumes, or other randomness."""

import os
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import truncate
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from senet.data import (
    Augmentation,
    BadImageError,
    FileImages,
    ImageData,
    MemoryImages,
    Preprocessing,
    TrainLoader,
    load_data,
    train_loader,
    val_loader,
)
from senet.data.sources import files
from senet.errors import UserError

MakeFolder = Callable[..., Path]
SHIFTS = Augmentation(crop="padded", padding=2, flip=True)
# All that draws random numbers, in the images and in the batch.
HEAVY = Augmentation(
    crop="random_resized",
    flip=True,
    rotation=10,
    jitter=20,
    randaugment=(2, 9),
    mixup=0.2,
    cutmix=1.0,
    random_erasing=0.5,
)


def numbered(n: int, size: int = 8, channels: int = 1, val: int = 5) -> ImageData:
    """Images of which number i is labelled i, so that labels tell which were taken."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    preprocessing = Preprocessing(size, size, (0.5,) * channels, (0.2,) * channels, channels)
    classes = tuple(str(i) for i in range(n))
    return ImageData(
        "numbered",
        MemoryImages(images, torch.arange(n)),
        MemoryImages(images[:val], torch.arange(val)),
        classes,
        preprocessing,
    )


def make(data: ImageData, augmentation: Augmentation = SHIFTS, **options: Any) -> TrainLoader:
    return train_loader(
        data, augmentation, **{"batch_size": 4, "seed": 3, "num_workers": 0, **options}
    )


def collect(loader: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in loader]


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def order(loader: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


@pytest.mark.parametrize("augmentation", [SHIFTS, HEAVY], ids=["shifts", "heavy"])
def test_workers_and_foreign_randomness_change_nothing(augmentation: Augmentation) -> None:
    data = numbered(18, size=12, channels=3)
    torch.manual_seed(1)
    here = make(data, augmentation)
    expected = [collect(here)]
    here.set_epoch(1)
    expected.append(collect(here))
    torch.manual_seed(2)
    random.seed(2)
    there = make(data, augmentation, num_workers=2)
    for epoch in (0, 1):  # the workers persist
        there.set_epoch(epoch)
        assert_same(collect(there), expected[epoch])
    assert not torch.equal(expected[0][0][0], expected[1][0][0])


@pytest.mark.parametrize("augmentation", [SHIFTS, HEAVY], ids=["shifts", "heavy"])
@pytest.mark.parametrize(("workers", "resumed_with"), [(0, 0), (2, 2), (0, 2), (2, 0)])
def test_resume_in_mid_epoch(augmentation: Augmentation, workers: int, resumed_with: int) -> None:
    data = numbered(22, size=12)
    loader = make(data, augmentation, num_workers=workers)
    loader.set_epoch(1)
    seen, state = [], {}
    for step, (images, labels) in enumerate(loader):
        seen.append((images.clone(), labels.clone()))
        if step == 1:
            state = loader.state_dict()
    loader.set_epoch(2)
    following = collect(loader)

    resumed = make(data, augmentation, num_workers=resumed_with)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.batches_done) == (1, 2)
    resumed.set_epoch(1)  # as a training loop does at the top of its epoch
    assert resumed.state_dict() == state
    assert_same(collect(resumed), seen[2:])
    assert resumed.batches_done == 5
    resumed.set_epoch(2)
    assert_same(collect(resumed), following)


def test_resume_after_the_last_batch_and_after_an_abandoned_epoch() -> None:
    data = numbered(12)
    loader = make(data)
    whole = order(loader)
    assert loader.state_dict()["batches_done"] == len(loader) == 3
    resumed = make(data)
    resumed.load_state_dict(loader.state_dict())
    assert order(resumed) == []  # the epoch was over
    assert order(resumed) == whole  # the position counts once
    for _ in resumed:
        break
    assert order(resumed) == whole


def test_an_abandoned_epoch_with_workers() -> None:
    loader = make(numbered(40), num_workers=2)
    whole = collect(loader)
    for _ in loader:
        break
    assert_same(collect(loader), whole)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 2}, "images_a_step 4, now it is 2"),
        ({"seed": 4}, "seed 3, now it is 4"),
        ({"world_size": 2}, "images_a_step 4, now it is 8"),
    ],
)
def test_a_state_of_other_batches_is_refused(change: dict[str, int], name: str) -> None:
    with pytest.raises(UserError, match=name):
        make(numbered(12), **change).load_state_dict(make(numbered(12)).state_dict())
    with pytest.raises(UserError, match="images 13, now it is 12"):
        make(numbered(12)).load_state_dict(make(numbered(13)).state_dict())


def test_epochs_shuffle_differently_and_seeds_too() -> None:
    loader = make(numbered(40))
    first = order(loader)
    assert sorted(first) == list(range(40))
    assert first != list(range(40))
    loader.set_epoch(1)
    assert sorted(order(loader)) == list(range(40))
    assert order(loader) != first
    loader.set_epoch(0)
    assert order(loader) == first
    assert order(make(numbered(40), seed=4)) != first


def test_augmentation_depends_on_seed_epoch_and_image_not_on_its_place() -> None:
    data = numbered(16)

    def by_label(epoch: int, **options: Any) -> dict[int, Tensor]:
        loader = make(data, SHIFTS, **options)
        loader.set_epoch(epoch)
        return {int(y): x for xs, ys in loader for x, y in zip(xs, ys, strict=True)}

    wide, narrow = by_label(0, batch_size=16), by_label(0, batch_size=2)
    assert all(torch.equal(wide[i], narrow[i]) for i in range(16))
    later = by_label(1, batch_size=16)
    assert sum(torch.equal(wide[i], later[i]) for i in range(16)) <= 3  # 1 in 50 by chance
    other_seed = by_label(0, batch_size=16, seed=4)
    assert sum(torch.equal(wide[i], other_seed[i]) for i in range(16)) <= 3


@pytest.mark.parametrize("channels", [1, 3])
def test_whole_batches_equal_single_images(tmp_path: Path, channels: int) -> None:
    """The quick path (arrays) and the general one (PIL and torchvision) give the same bits."""
    data = numbered(8, channels=channels)
    assert isinstance(data.train, MemoryImages)
    paths = []
    for i in range(8):
        image, _ = data.train[i]
        paths.append(str(tmp_path / f"{i}.png"))
        image.save(paths[-1])
    files = FileImages(paths, torch.arange(8), channels)
    from_files = ImageData("files", files, files, data.classes, data.preprocessing)
    for augmentation in (SHIFTS, Augmentation(flip=True), Augmentation()):
        assert_same(collect(make(data, augmentation)), collect(make(from_files, augmentation)))
    options = {"batch_size": 3, "num_workers": 0}
    in_memory = ImageData("memory", data.train, data.train, data.classes, data.preprocessing)
    assert_same(
        collect(val_loader(in_memory, **options)), collect(val_loader(from_files, **options))
    )


def test_a_data_set_of_ones_own() -> None:
    """Anything with __len__ and (PIL image, label) works, and other sizes are resized."""

    class Own(MemoryImages):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            image, label = super().__getitem__(index)
            return image.resize((20, 30)).convert("RGBA"), label

    base = numbered(9)
    own = Own(torch.zeros(9, 3, 2, 2, dtype=torch.uint8), torch.arange(9))
    data = ImageData("own", own, own, base.classes, base.preprocessing)
    (images, labels), *_ = make(data, Augmentation(crop="random_resized"))
    assert images.shape == (4, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert [len(y) for _, y in val_loader(data, batch_size=4, num_workers=0)] == [4, 4, 1]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("n", "world_size"), [(24, 3), (25, 3), (23, 2), (31, 4)])
def test_every_rank_trains_on_as_many_images(n: int, world_size: int, drop_last: bool) -> None:
    data = numbered(n)
    options = {"batch_size": 2, "world_size": world_size, "drop_last": drop_last}
    ranks = [collect(make(data, rank=r, **options)) for r in range(world_size)]
    assert len({tuple(len(y) for _, y in batches) for batches in ranks}) == 1
    taken = [label for batches in ranks for _, y in batches for label in y.tolist()]
    if drop_last:
        assert len(set(taken)) == len(taken) == n // (2 * world_size) * 2 * world_size
    else:
        assert set(taken) == set(range(n))
        assert len(taken) == -(-n // world_size) * world_size


def test_ranks_together_take_the_batches_of_one_process() -> None:
    data = numbered(24)
    alone = [set(y.tolist()) for _, y in make(data, batch_size=4)]
    pairs = zip(*(make(data, batch_size=2, rank=r, world_size=2) for r in range(2)), strict=True)
    assert [set(a[1].tolist()) | set(b[1].tolist()) for a, b in pairs] == alone


@pytest.mark.parametrize(("n", "world_size"), [(10, 1), (10, 3), (2, 3)])
def test_evaluation_takes_each_image_once(n: int, world_size: int) -> None:
    data = numbered(10, val=n)
    ranks = [
        order(val_loader(data, batch_size=2, num_workers=0, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert sorted(label for labels in ranks for label in labels) == list(range(n))


def test_evaluation_with_workers() -> None:
    data = numbered(10, val=10)
    loader = val_loader(data, batch_size=3, num_workers=2)
    first = collect(loader)
    assert order(loader) == list(range(10))
    assert_same(first, collect(val_loader(data, batch_size=3, num_workers=0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(workers: int) -> None:
    data = numbered(16, size=12)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    collect(make(data, HEAVY, num_workers=workers))
    collect(val_loader(data, batch_size=4, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]  # noqa: NPY002


def test_mixed_labels_are_soft() -> None:
    images, labels = next(iter(make(numbered(8), Augmentation(mixup=0.5))))
    assert images.dtype == labels.dtype == torch.float32
    assert labels.shape == (4, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_in_one_line(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    folder = make_folder(
        {"train": {"cat": 200, "dog": 1}, "val": {"cat": 200, "dog": 1}}, suffix=".jpg"
    )
    for split in ("train", "val"):
        truncate(folder / split / "cat" / "101.jpg")
    monkeypatch.setattr(files, "CHECKED_LIMIT", 0)
    data = load_data(str(folder), image_size=8)
    with pytest.raises(BadImageError, match=r"^cannot read the image '.*train/cat/101\.jpg': .*$"):
        collect(make(data, num_workers=workers))
    with pytest.raises(BadImageError, match=r"^cannot read the image '.*val/cat/101\.jpg': .*$"):
        collect(val_loader(data, batch_size=8, num_workers=workers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, not -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be 0 to 1 .*not 2"),
        ({"rank": 0, "world_size": 0}, "world_size must be at least 1, not 0"),
        ({"seed": -1}, "seed must be between 0"),
        ({"batch_size": 7}, "batch_size 7 × 1 processes exceeds the 6 training images: .*most 6"),
        ({"batch_size": 4, "world_size": 2}, "most 3"),
    ],
)
def test_invalid_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(numbered(6), **options)


def test_more_workers_than_cores_warns_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    data = numbered(8)
    with pytest.warns(UserWarning, match="3 loader workers on 2 cores.*num_workers <= 2") as caught:
        make(data, num_workers=3)
    assert len(caught) == 1
    assert caught[0].filename == __file__ or "\n" not in str(caught[0].message)
    with pytest.warns(UserWarning, match="3 loader workers") as caught:
        val_loader(data, batch_size=2, num_workers=3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(data, num_workers=2)


def test_it_is_a_stateful_data_loader() -> None:
    loader = make(numbered(9), drop_last=False)
    assert isinstance(loader, StatefulDataLoader)
    assert len(loader) == 3
    assert [len(labels) for _, labels in loader] == [4, 4, 1]
