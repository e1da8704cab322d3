"""Loaders whose batches depend on (seed, epoch, step) only.

Neither the number of workers nor the place where a run was resumed changes a batch: the sampler
hands out keys (epoch, step, index), and everything random about an image is drawn from a
generator seeded by its key.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from senet.data.augmentation import Augmentation
from senet.data.image_data import ImageData, ImageStream
from senet.data.images import BadImageError, ImageSource, MemoryImages
from senet.data.labels import Target, batched
from senet.data.samplers import EpochBatchSampler, Key, mix_seed
from senet.data.transforms import (
    PaddedCropFlip,
    Preprocessing,
    batch_transform,
    training_transform,
)
from senet.errors import UserError

Batch = tuple[Tensor, Tensor]
"""Images (N,C,H,W) float32; class numbers (N,) int64, or (N,K) float32: labels, numbers, and
classes after mixup or cutmix."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's global CPU generator within the block and restore it afterwards.

    Not `torch.manual_seed`, which seeds every device and takes 100 times as long.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _without_bad(batches: Iterator[Batch | BadImageError]) -> Iterator[Batch]:
    """Raise the error that the data sets below hand over in place of a batch.

    If a worker raised it, DataLoader would turn it into the text of a traceback, and hold its
    workers in a reference cycle whose collection waits 5 s for each.
    """
    for batch in batches:
        if isinstance(batch, BadImageError):
            raise BadImageError(batch.path, batch.why)  # `batch` itself would make such a cycle
        yield batch


class _TrainBatches(Dataset[Batch | BadImageError]):
    """Augmented batches by the keys of their images."""

    def __init__(
        self, data: ImageData, augmentation: Augmentation, seed: int, rank: int, balanced: bool
    ) -> None:
        self.source = data.train
        self.balanced = balanced
        self.preprocessing = data.preprocessing
        self.seed = seed
        self.rank = rank
        self.transform = training_transform(augmentation, data.preprocessing)
        self.mix = batch_transform(augmentation, len(data.classes))
        self.shifts: PaddedCropFlip | None = None
        if augmentation.only_shifts and _fits(self.source, self.preprocessing):
            self.shifts = PaddedCropFlip(augmentation.padding, augmentation.flip)

    def __getitems__(self, keys: Sequence[Key]) -> Batch | BadImageError:
        try:
            images, labels = self._images(keys)
        except BadImageError as error:
            return error
        if self.mix is None:
            return images, labels
        with seeded(mix_seed(self.seed, keys[0].epoch, keys[0].step, self.rank, -1)):
            images, labels = self.mix(images, labels)
        return images, labels

    def _seed(self, key: Key) -> int:
        """Of an image's augmentation; one that an epoch takes several times looks different."""
        again = (key.step,) if self.balanced else ()
        return mix_seed(self.seed, key.epoch, key.image, *again)

    def _images(self, keys: Sequence[Key]) -> Batch:
        seeds = [self._seed(key) for key in keys]
        if self.shifts is not None:
            assert isinstance(self.source, MemoryImages)
            indices = [key.image for key in keys]
            generator = torch.Generator()
            draws = [self.shifts.draw(generator.manual_seed(seed)) for seed in seeds]
            shifted = self.shifts.batch(self.source.pixels[indices], draws)
            return self.preprocessing.finish_batch(shifted), self.source.targets[indices]
        images, labels = [], []
        for key, seed in zip(keys, seeds, strict=True):
            image, label = _opened(self.source, key, key.image)
            with seeded(seed):
                images.append(self.transform(image))
            labels.append(label)
        return torch.stack(images), batched(labels)


def _opened(source: ImageSource | ImageStream, key: Any, image: int) -> tuple[Any, Target]:
    """A decoded image and its target: of a stream by its key, otherwise by its number."""
    return source.open(key) if isinstance(source, ImageStream) else source[image]


class _ValBatches(Dataset[Batch | BadImageError]):
    """Evaluation batches by the indices of their images, or the keys of a stream's."""

    def __init__(self, data: ImageData) -> None:
        self.source = data.val
        self.preprocessing = data.preprocessing
        self.transform = data.preprocessing.transform()

    def __getitems__(self, indices: list[Any]) -> Batch | BadImageError:
        if _fits(self.source, self.preprocessing):
            assert isinstance(self.source, MemoryImages)
            images = self.preprocessing.finish_batch(self.source.pixels[indices])
            return images, self.source.targets[indices]
        try:
            pairs = [_opened(self.source, index, index) for index in indices]
        except BadImageError as error:
            return error
        images = torch.stack([self.transform(image) for image, _ in pairs])
        return images, batched([target for _, target in pairs])


def _fits(source: ImageSource | ImageStream, preprocessing: Preprocessing) -> bool:
    """Whether the images are in memory as the network takes them, but for the normalization."""
    size = preprocessing.image_size
    return (
        type(source) is MemoryImages  # a subclass may change its images on access
        and source.images.shape[1:] == (preprocessing.channels, size, size)
        and (source.images.dtype == torch.uint8) == (preprocessing.depth == "8")
        and preprocessing.resize in (None, size)
    )


def no_whole_batch(batch_size: int, world_size: int, images: int) -> UserError:
    """The error of training images that are fewer than a batch of each process."""
    return UserError(
        f"batch_size {batch_size} × {world_size} processes exceeds the {images} training images: "
        f"choose a batch_size of at most {images // world_size}"
    )


def as_is(batch: Batch | BadImageError) -> Batch | BadImageError:
    """Collate nothing: the data sets here give whole batches."""
    return batch


class TrainLoader(StatefulDataLoader):
    """Training batches with an exact position; see `train_loader`.

    Its state is the epoch and the number of batches handed out, not StatefulDataLoader's own
    record of each worker, so that a run may be resumed with another number of workers.

    Example:
        for epoch in range(loader.epoch, epochs):
            loader.set_epoch(epoch)
            for images, labels in loader:
                ...  # loader.state_dict() here counts this batch as done
    """

    batch_sampler: EpochBatchSampler

    def __init__(self, sampler: EpochBatchSampler, **options: Any) -> None:
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.14 deprecates.
            warnings.filterwarnings("ignore", message=".*set_vital", category=UserWarning)
            super().__init__(batch_sampler=sampler, **options)
        self._done = 0

    def check_worker_number_rationality(self) -> None:
        """Replaced by the one-line warning of `train_loader`."""

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self.batch_sampler.epoch

    @property
    def batches_done(self) -> int:
        """Batches of the current epoch that have been handed out."""
        return self._done

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the position is kept if it is the current one (after a resume)."""
        if epoch != self.epoch:
            self._done = 0
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        self._done = self.batch_sampler.start
        batches = super().__iter__()
        # A position from a checkpoint counts for one iteration; the next is a whole epoch.
        self.batch_sampler.start = 0
        for batch in _without_bad(batches):
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches done in it, and what the order of the batches depends on."""
        sampler = self.batch_sampler
        return {
            "epoch": sampler.epoch,
            "batches_done": self._done,
            "images": sampler.n,
            "batch_size": sampler.batch_size,
            "world_size": sampler.world_size,
            "seed": sampler.seed,
            **sampler.facts(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state_dict` was called, of any number of ranks.

        Raises:
            UserError: the state belongs to a loader with other batches.
        """
        state_dict, expected = dict(state_dict), self.state_dict()
        # The images of a step are those of all processes together, however many these are.
        for facts in (state_dict, expected):
            facts["images_a_step"] = facts["batch_size"] * facts["world_size"]
        for name in ("images", "images_a_step", "seed"):
            if state_dict[name] != expected[name]:
                raise UserError(
                    f"the checkpoint was made with {name} {state_dict[name]}, now it is "
                    f"{expected[name]}: resume with the same data, batch size and seed"
                )
        self.batch_sampler.check_facts(state_dict)
        self.batch_sampler.epoch = state_dict["epoch"]
        self.batch_sampler.start = self._done = state_dict["batches_done"]


class ValLoader(DataLoader[Any]):
    """Evaluation batches; see `val_loader`."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # not DataLoader's own class
        return _without_bad(super().__iter__())

    def check_worker_number_rationality(self) -> None:
        """Replaced by the one-line warning of `val_loader`."""


def loader_options(
    batch_size: int, num_workers: int, rank: int, world_size: int, pin_memory: bool
) -> dict[str, Any]:
    """Validate what all loaders take; return the options that they give to DataLoader."""
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    if num_workers < 0:
        raise UserError(f"num_workers must be 0 or more, not {num_workers}")
    if world_size < 1:
        raise UserError(f"world_size must be at least 1, not {world_size}")
    if not 0 <= rank < world_size:
        raise UserError(f"rank must be 0 to {world_size - 1} (world_size - 1), not {rank}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores is not None and num_workers > cores:
        warnings.warn(
            f"{num_workers} loader workers on {cores} cores slow each other down; "
            f"use num_workers <= {cores}",
            stacklevel=3,
        )
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "collate_fn": as_is,
        "pin_memory": pin_memory,
        "generator": torch.Generator(),  # starting an iteration would advance the global one
    }


def class_numbers(data: ImageData, what: str) -> Tensor:
    """(N,) class of each training image, without opening one.

    Args:
        data: from `load_data`.
        what: needs it, for the error.

    Raises:
        UserError: the data do not tell, or an image has several labels or numbers.
    """
    if data.task != "classification":
        raise UserError(
            f"{what} is for one class an image, {data.name} is for {data.task}: leave it out"
        )
    return known_targets(data, what)


def known_targets(data: ImageData, what: str) -> Tensor:
    """The target of each training image, (N,) or (N,K), without opening one.

    Args:
        data: from `load_data`.
        what: needs them, for the error.

    Raises:
        UserError: the data do not tell.
    """
    targets = getattr(data.train, "targets", None)
    if isinstance(data.train, ImageStream) or not isinstance(targets, Tensor):
        raise UserError(
            f"{what} counts the images of each class before the start, which {data.name} does not "
            "tell: leave it out"
        )
    return targets


def _balanced_order(targets: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) numbers of images, drawn so that each class comes as often as another."""
    weights = 1 / torch.bincount(targets).clamp(min=1)[targets].double()
    return torch.multinomial(weights, len(targets), replacement=True, generator=generator)


def train_loader(
    data: ImageData,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
    pin_memory: bool = False,
    balanced: bool = False,
) -> TrainLoader:
    """Loader of shuffled, augmented training batches.

    A batch is a function of (seed, epoch, step): the same for any `num_workers`, and after
    `load_state_dict` in the middle of an epoch. Neither loading nor iterating changes the
    global random generators. Do not pass it through `accelerate.prepare`, which would replace
    its sampler; `rank` and `world_size` do the sharding.

    Args:
        data: from `load_data`.
        augmentation: random changes to the images.
        batch_size: images in a batch of this rank (a step takes world_size times as many).
        seed: of the order and of the augmentation.
        num_workers: processes that load; 0 loads in this one, more than the cores warns.
        rank: index of this process among those that train together.
        world_size: number of those processes; each gets the same number of images.
        drop_last: leave out the last incomplete step of an epoch.
        pin_memory: copy batches to page-locked memory, for a GPU.
        balanced: an epoch takes as many images, but draws each class as often as another: images
            of rare classes come several times, others not at all.

    Returns:
        An iterable of (images (N,C,H,W) float32, labels (N,) int64, or (N,classes) float32 with
        mixup or cutmix).

    Raises:
        UserError: a value outside its range, not one whole batch in the data, or `balanced` where
            nobody knows the classes before the images come.
    """
    options = loader_options(batch_size, num_workers, rank, world_size, pin_memory)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be between 0 and 2^63 - 1, not {seed}")
    n = len(data.train)
    sampler: EpochBatchSampler
    if isinstance(data.train, ImageStream):
        if balanced:
            class_numbers(data, "a balanced sampler")
        sampler = data.train.train_batches(batch_size, seed, rank, world_size, drop_last)
    else:
        order = getattr(data.train, "epoch_order", None)
        if balanced:
            order = partial(_balanced_order, class_numbers(data, "a balanced sampler"))
        sampler = EpochBatchSampler(n, batch_size, seed, rank, world_size, drop_last, order)
    if len(sampler) == 0:
        raise no_whole_batch(batch_size, world_size, n)
    return TrainLoader(
        sampler, dataset=_TrainBatches(data, augmentation, seed, rank, balanced), **options
    )


def val_loader(
    data: ImageData,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Loader of the evaluation images, each exactly once over all ranks.

    Rank r takes images r, r + world_size, …; ranks may differ by one image (and one batch; of a
    stream that is split by files, by more), so add up their counts after the loop instead of
    gathering batch by batch.

    Args:
        data: from `load_data`.
        batch_size: images in a batch; the last one may be smaller.
        num_workers: processes that load; 0 loads in this one, more than the cores warns.
        rank: index of this process.
        world_size: number of processes.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Returns:
        An iterable of (images (N,C,H,W) float32, labels (N,) int64).

    Raises:
        UserError: a value outside its range.
    """
    options = loader_options(batch_size, num_workers, rank, world_size, pin_memory)
    if isinstance(data.val, ImageStream):
        batches = data.val.val_batches(batch_size, rank, world_size)
        return ValLoader(_ValBatches(data), batch_sampler=batches, **options)
    return ValLoader(
        _ValBatches(data),
        batch_size=batch_size,
        sampler=range(rank, len(data.val), world_size),
        **options,
    )
