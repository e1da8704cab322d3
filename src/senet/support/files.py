"""Writing files so that a reader never sees half of one."""

import os
import tempfile
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable (POSIX: a rename is durable once its folder is)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace `path` by `data` as a whole or not at all.

    Writes a temporary file in the same folder, flushes it to the disk and renames it over
    `path`, so that a kill or a full disk leaves the former content.

    Args:
        path: file to write; its folder must exist.
        data: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the folder is missing or unwritable, or the disk is full; `path` is unchanged.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
