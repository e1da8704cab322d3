"""Reading a stream in a thread, ahead of who takes its batches."""

import atexit
import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")
_AHEAD = 2  # batches that are read ahead of those that were taken
_CLOSING = 10.0  # seconds that the end of the program waits for a stream to be closed


class _Reader(Generic[T]):
    """A thread that takes batches from an iterator as they are asked for.

    `stop` may run while the garbage collector does, in the middle of whatever the thread at hand is
    at: it takes no lock that this thread may hold, as that of an executor would be.

    Args:
        batches: what to read; closed in the thread, after `stop`.
    """

    def __init__(self, batches: Generator[T, None, None]) -> None:
        self._batches = batches
        self._wanted: SimpleQueue[bool] = SimpleQueue()  # reentrant, unlike Queue
        self._found: SimpleQueue[T | Exception | None] = SimpleQueue()
        self._stopped = False
        # A daemon, or an interpreter that ends while it waits would wait for it.
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)
        self._thread.start()
        _READERS.add(self)

    def _read(self) -> None:
        while self._wanted.get() and not self._stopped:
            try:
                self._found.put(next(self._batches, None))
            except Exception as error:  # raised where the batch is taken
                self._found.put(error)
        self._batches.close()

    def ask(self) -> None:
        """Let it read one more."""
        self._wanted.put(True)

    def take(self) -> T | None:
        """The oldest one that was asked for, None behind the last; raises what reading it did."""
        found = self._found.get()
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        """Let it close the iterator and end, without waiting for it."""
        self._stopped = True
        self._wanted.put(False)

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        self._thread.join(seconds)


_READERS: "WeakSet[_Reader[Any]]" = WeakSet()


@atexit.register
def _stop_readers() -> None:
    """Let Arrow's threads end before the interpreter does."""
    readers = list(_READERS)
    for reader in readers:
        reader.stop()
    for reader in readers:
        reader.join(_CLOSING)


def read_ahead(batches: Generator[T, None, None], count: int | None = None) -> Iterator[T]:
    """The same, with the next ones being read in a thread while the caller works.

    The thread starts with the first batch, when the loader has forked its workers. It closes the
    stream too, and nobody waits for that: where files are interleaved, `datasets` (5.2) then
    sleeps for 5 s, so that Arrow's threads may end.

    Args:
        batches: what to read.
        count: how many there are, if that is known.
    """
    reader = _Reader(batches)
    asked = taken = 0
    try:
        while True:
            while asked - taken <= _AHEAD and asked != count:
                reader.ask()
                asked += 1
            if taken == asked or (batch := reader.take()) is None:
                return
            taken += 1
            yield batch
    finally:
        reader.stop()
