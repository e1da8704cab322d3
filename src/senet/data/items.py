"""Loaders of any data set of pairs, whose batches depend on (seed, epoch, step) only."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from senet.data.loaders import TrainLoader, ValLoader, loader_options, no_whole_batch, seeded
from senet.data.samplers import EpochBatchSampler, Key, mix_seed
from senet.errors import UserError

Mix = Callable[[Any, Any], Any]


class Items(Protocol):
    """A map-style data set of pairs: what a network takes, and its target."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of PyTorch's CPU, Python and NumPy within the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _pair(items: Items, index: int, transform: Callable[[Any], Any] | None) -> tuple[Any, Any]:
    found = items[index]
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise UserError(
            f"the data set gives {type(found).__name__} for item {index}, where (image, target) is "
            "needed"
        )
    x, y = found
    return (x if transform is None else transform(x)), y


class _Train(Dataset[Any]):
    def __init__(
        self,
        items: Items,
        transform: Callable[[Any], Any] | None,
        mix: Mix | None,
        seed: int,
        rank: int,
    ) -> None:
        self.items = items
        self.transform = transform
        self.mix = mix
        self.seed = seed
        self.rank = rank

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        pairs = []
        for key in keys:
            with all_seeded(mix_seed(self.seed, key.epoch, key.image)):
                pairs.append(_pair(self.items, key.image, self.transform))
        images, targets = default_collate(pairs)
        if self.mix is None:
            return images, targets
        with seeded(mix_seed(self.seed, keys[0].epoch, keys[0].step, self.rank, -1)):
            return tuple(self.mix(images, targets))


class _Val(Dataset[Any]):
    def __init__(self, items: Items, transform: Callable[[Any], Any] | None) -> None:
        self.items = items
        self.transform = transform

    def __getitems__(self, indices: list[int]) -> Any:
        return tuple(default_collate([_pair(self.items, i, self.transform) for i in indices]))


def items_loader(
    items: Items,
    *,
    transform: Callable[[Any], Any] | None,
    mix: Mix | None,
    batch_size: int,
    seed: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> TrainLoader:
    """`senet.data.train_loader` for any data set of pairs.

    Whatever `items` and `transform` draw from the global generators of PyTorch, Python and NumPy
    is a function of (seed, epoch, image).

    Args:
        items: gives (image, target) by number; pairs are collated as PyTorch's DataLoader does.
        transform: of each image.
        mix: of a batch of images and targets, such as mixup.
        batch_size, seed, num_workers, rank, world_size, pin_memory: as there.

    Raises:
        UserError: a value outside its range, or not one whole batch in the data.
    """
    options = loader_options(batch_size, num_workers, rank, world_size, pin_memory)
    sampler = EpochBatchSampler(len(items), batch_size, seed, rank, world_size, drop_last=True)
    if len(sampler) == 0:
        raise no_whole_batch(batch_size, world_size, len(items))
    return TrainLoader(sampler, dataset=_Train(items, transform, mix, seed, rank), **options)


def items_val_loader(
    items: Items,
    *,
    transform: Callable[[Any], Any] | None,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """`senet.data.val_loader` for any data set of pairs; arguments as for `items_loader`."""
    options = loader_options(batch_size, num_workers, rank, world_size, pin_memory)
    return ValLoader(
        _Val(items, transform),
        batch_size=batch_size,
        sampler=range(rank, len(items), world_size),
        **options,
    )
