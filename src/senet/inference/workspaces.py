"""Memory for runs of programs: one for each run that goes on, kept for the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from senet.inference import kernels

# Bytes of workspaces that nobody uses at the moment; one is kept however large it is.
KEPT_BYTES = 1 << 30


class Workspace:
    """Memory for the maps and the scratch of one run.

    Args:
        size: number of floats.

    Attributes:
        memory: float32, at least (size,).
        prepared_for: the program whose steps are in `parts`.
        parts: steps with the addresses of this memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        with torch.inference_mode(False):  # where it was made, others may run outside of it
            self.memory = kernels.allocate(size)
        self.prepared_for: object = None
        self.parts: list[Any] = []


class Workspaces:
    """Workspaces that programs of all shapes take in turns, as many as run at the same time.

    Attributes:
        idle: those that nobody uses at the moment, the one used last at the end.
    """

    def __init__(self) -> None:
        self.idle: list[Workspace] = []
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, size: int) -> Iterator[Workspace]:
        """A workspace of at least `size` floats for one run."""
        workspace = self._take(size) or Workspace(size)
        try:
            yield workspace
        finally:
            with self._lock:
                self.idle.append(workspace)
                while len(self.idle) > 1 and 4 * sum(w.size for w in self.idle) > KEPT_BYTES:
                    self.idle.pop(0)

    def _take(self, size: int) -> Workspace | None:
        with self._lock:
            fitting = [w for w in self.idle if w.size >= size]
            if fitting:
                # Of those the smallest, so that a large one stays for a run that needs it.
                found = min(fitting, key=lambda w: w.size)
            elif self.idle:  # replaced by a larger one
                self.idle.remove(max(self.idle, key=lambda w: w.size))
                return None
            else:
                return None
            self.idle.remove(found)
            oversized = 4 * found.size > max(KEPT_BYTES, 8 * size)
            return None if oversized else found
