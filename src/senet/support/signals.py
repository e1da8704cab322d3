"""Signals that ask for an orderly stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def first_signal(*numbers: int, told: Callable[[int], None]) -> Iterator[None]:
    """Call something at the first of some signals; a second one acts as it did before.

    Python delivers signals to the main thread only: in another one this does nothing.

    Args:
        *numbers: the signals, such as `signal.SIGTERM`.
        told: called with the number of the one that came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def tell(number: int, frame: FrameType | None) -> None:
        restore()
        told(number)

    for number in numbers:
        signal.signal(number, tell)
    try:
        yield
    finally:
        restore()
