"""Which images a batch takes: a function of (seed, epoch, step)."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler


class Key(NamedTuple):
    """What a training image is drawn by: its epoch, its step within it, its place in the data."""

    epoch: int
    step: int
    image: int


def mix_seed(*numbers: int) -> int:
    """A seed that depends on all the numbers, each a 64-bit integer (BLAKE2b)."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class EpochBatchSampler(Sampler[list[Key]]):
    """Shuffled batches of an epoch, a function of (seed, epoch), shared among ranks.

    Step k of all ranks together takes images k·batch_size·world_size onward of the epoch's
    permutation, and each rank every world_size-th of them. With `drop_last=False`, the last step
    is filled up from the permutation's start to a multiple of world_size, so that every rank gets
    the same number of images. A data set may have an order of its own (`ShardImages.epoch_order`):
    a permutation of its n images from a generator.

    Attributes:
        epoch: whose batches the next iteration gives.
        start: step at which the next iteration begins.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
        order: Callable[[torch.Generator], Tensor] | None = None,
    ) -> None:
        self.n = n
        self.order = order
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than the current starts at its first step."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        together = self.batch_size * self.world_size
        return self.n // together if self.drop_last else -(-self.n // together)

    def facts(self) -> dict[str, Any]:
        """What else the batches depend on, for the loader's state."""
        return {}

    def check_facts(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a loader with other facts; there are none here."""

    def __iter__(self) -> Iterator[list[Key]]:
        # Read now, not at the first batch: the loader resets `start` once it has its iterator.
        return self._batches(self.epoch, self.start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        together = self.batch_size * self.world_size
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        if self.order is None:
            permutation = torch.randperm(self.n, generator=generator).tolist()
        else:
            permutation = self.order(generator).tolist()
        missing = -self.n % self.world_size
        while missing > 0:  # more than once where there are more ranks than images
            permutation += permutation[:missing]
            missing = -len(permutation) % self.world_size
        for step in range(start, len(self)):
            indices = permutation[step * together : (step + 1) * together]
            yield [Key(epoch, step, index) for index in indices[self.rank :: self.world_size]]
