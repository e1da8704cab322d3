"""The sampler of training batches alone: the position within an epoch, and the shares of ranks."""

import torch

from senet.data.samplers import EpochBatchSampler, mix_seed


def sampler(n: int = 10, batch_size: int = 2, **options: object) -> EpochBatchSampler:
    values = {"seed": 3, "rank": 0, "world_size": 1, "drop_last": True, **options}
    return EpochBatchSampler(n, batch_size, **values)  # type: ignore[arg-type]


def images(batches: EpochBatchSampler) -> list[list[int]]:
    return [[key.image for key in batch] for batch in batches]


def permutation(n: int, epoch: int, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(n, generator=generator).tolist()


def test_another_epoch_starts_at_its_first_step() -> None:
    batches = sampler()
    batches.epoch, batches.start = 4, 3
    batches.set_epoch(4)  # the same: it goes on
    assert (batches.epoch, batches.start) == (4, 3)
    order = permutation(10, 4)
    assert images(batches) == [order[6:8], order[8:10]]
    batches.set_epoch(5)
    assert (batches.epoch, batches.start) == (5, 0)
    order = permutation(10, 5)
    assert images(batches) == [order[i : i + 2] for i in range(0, 10, 2)]


def test_keys_tell_epoch_and_step() -> None:
    batches = sampler()
    batches.epoch, batches.start = 1, 2
    keys = [key for batch in batches for key in batch]
    assert [(key.epoch, key.step) for key in keys] == [(1, s) for s in (2, 3, 4) for _ in range(2)]


def test_the_start_is_read_when_iteration_begins() -> None:
    """The loader resets `start` once it has its iterator."""
    batches = sampler()
    batches.start = 4
    iterator = iter(batches)
    batches.epoch, batches.start = 1, 0
    assert [[key.image for key in batch] for batch in iterator] == [permutation(10, 0)[8:]]


def test_ranks_take_turns() -> None:
    order = permutation(14, 0)
    ranks = [sampler(14, 2, rank=rank, world_size=3) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [2, 2, 2]  # the last two images are left out
    for number, rank in enumerate(ranks):
        assert images(rank) == [order[number:6:3], order[6 + number : 12 : 3]]


def test_without_drop_last_every_rank_gets_as_many() -> None:
    order = permutation(14, 0)
    ranks = [sampler(14, 2, rank=rank, world_size=3, drop_last=False) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [3, 3, 3]
    filled = order + order[:1]  # 15, a multiple of 3
    for number, rank in enumerate(ranks):
        assert images(rank) == [filled[start + number : start + 6 : 3] for start in (0, 6, 12)]
    # More ranks than images: the permutation comes several times.
    few = [sampler(2, 1, rank=rank, world_size=5, drop_last=False) for rank in range(5)]
    first, second = permutation(2, 0)
    assert [images(rank) for rank in few] == [[[i]] for i in (first, second, first, second, first)]


def test_a_data_sets_own_order() -> None:
    seeds = []

    def order(generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return torch.arange(6).flip(0)

    batches = sampler(6, 3, order=order)
    batches.set_epoch(2)
    assert images(batches) == [[5, 4, 3], [2, 1, 0]]
    assert seeds == [mix_seed(3, 2)]


def test_seeds_depend_on_each_number_and_its_place() -> None:
    assert mix_seed(1, 2) == 11868681386100499350
    seeds = {mix_seed(*numbers) for numbers in ((1, 2), (2, 1), (1, 3), (1,), (1, 2, 0), (-1, 2))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**64 for seed in seeds)
