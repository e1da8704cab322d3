"""Python's garbage collector, kept away from what a command imports."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import without collecting garbage, and leave what is there out of later collections.

    PyTorch and what comes with it are a million objects that stay. Looking through them again and
    again takes a sixth of the time of the imports, and as long once more when the process ends.
    Objects are set aside once in a process: what is garbage by then is never collected.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        if enabled:
            gc.enable()
