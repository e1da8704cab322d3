"""Loading ahead, in threads, of who takes the batches."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def load_ahead(
    items: Iterable[Item], load: Callable[[Item], Loaded], batch_size: int, ahead: int = 2
) -> Iterator[list[Loaded]]:
    """Batches of loaded items, in order; the next ones are loaded while the caller works.

    Args:
        items: what to load, image files for instance.
        load: loads one; runs in threads (Pillow decodes and resizes outside of Python's lock).
        batch_size: items of a batch.
        ahead: batches that are loaded ahead.
    """
    iterator = iter(items)
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Future[Loaded]]] = deque()
        while True:
            while len(waiting) <= ahead:
                part = list(itertools.islice(iterator, batch_size))
                if not part:
                    break
                waiting.append([pool.submit(load, item) for item in part])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]
