"""Loaders that were handed over, with a position that can be gone back to."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from senet.data.items import all_seeded
from senet.data.samplers import mix_seed
from senet.errors import UserError
from senet.training.machine import random_state, set_random_state

_CPU = torch.device("cpu")


class ReplayedLoader:
    """Any loader as training batches whose order and randomness depend on (seed, epoch) only.

    What the loader draws from the global generators (of PyTorch's CPU, Python and NumPy) in this
    process, and the seeds that it gives to new workers, come from a stream of its own for each
    epoch. A position within an epoch is reached by drawing its batches again.

    Args:
        loader: with a length; its batches are (images, targets).
        seed: of the run.
        mix: of a batch of images and targets, such as mixup.
    """

    def __init__(self, loader: Any, seed: int, mix: Callable[[Any, Any], Any] | None) -> None:
        self.loader = loader
        self.seed = seed
        self.mix = mix
        self.epoch = self.start = self.done = 0

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than the current starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches done in it, and how many it has."""
        return {"epoch": self.epoch, "batches_done": self.done, "batches": len(self)}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Continue after the batch at which `state_dict` was called.

        Raises:
            UserError: the loader has another number of batches than then.
        """
        if (before := state_dict["batches"]) != len(self):
            raise UserError(
                f"the loader gave {before} batches an epoch when the run began, now {len(self)}: "
                "give the same one"
            )
        self.epoch, self.start = state_dict["epoch"], state_dict["batches_done"]

    def __iter__(self) -> Iterator[Any]:
        # Now, not at the first batch: `start` counts for one iteration.
        start, self.start = self.start, 0
        self.done = start
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[Any]:
        seed = mix_seed(self.seed, self.epoch, -2) % 2**63
        sampler: Any = getattr(self.loader, "sampler", None)
        for part in (self.loader, sampler):
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        stream = _Stream(seed)
        with stream:
            batches = iter(self.loader)
        for number in range(len(self)):
            with stream:
                batch = next(batches, None)
                if batch is None:
                    raise UserError(
                        f"the loader says it has {len(self)} batches and gave {number}: give one "
                        "whose length is right"
                    )
                if self.mix is not None:
                    batch = self.mix(*batch)
            if number >= start:
                self.done = number + 1
                yield batch


class _Stream:
    """The global generators as they go on within its blocks alone."""

    def __init__(self, seed: int) -> None:
        with all_seeded(seed):
            self.mine = random_state(_CPU)

    def __enter__(self) -> None:
        self.theirs = random_state(_CPU)
        set_random_state(self.mine, _CPU)

    def __exit__(self, *raised: object) -> None:
        self.mine = random_state(_CPU)
        set_random_state(self.theirs, _CPU)
