"""Writing files and folders so that a reader never sees half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable (POSIX: a rename is durable once its folder is)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it; nothing where there is none."""
    if folder.exists():
        shutil.rmtree(folder)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def durable_write(path: Path, data: bytes | memoryview) -> None:
    """Write a file and flush it to the disk: for the files of an `atomic_folder`."""
    with path.open("wb") as file:
        file.write(data)
        _flush(file)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have errors name the place that was asked for, and not the temporary one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to fill, which replaces `path` as a whole or not at all.

    It lies in the same folder, and is flushed to the disk and renamed over `path` at the end, so
    that an error, a kill or a full disk leaves the former content.

    Args:
        path: file to write; its folder must exist.

    Raises:
        OSError: the folder is missing or unwritable, or the disk is full; `path` is unchanged.
    """
    path = Path(path)
    with _named(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            _flush(file)
        Path(name).chmod(0o644)
        with _named(path):
            Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8) as a whole or not at all, see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_folder(path: Path, *, former: Path | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `path` as a whole or not at all.

    It lies beside `path` under a hidden name and is renamed at the end; an error removes it. Files
    in it are written by `durable_write`, or by what flushes them too.

    Args:
        path: folder to make; its parents are made.
        former: where a folder goes that has the name already, in place of what is there. Only one
            process may write `path` then: what a kill left beside it is removed. None: `path` must
            be new.

    Raises:
        OSError: the place is unwritable, or the disk is full; what was there still is, as `path`
            or, after a kill between two renames, as `former`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if former is None:
        with _named(path):
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o755)
    else:
        temporary = path.parent / f".{path.name}.tmp"
        remove_folder(temporary)
        temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if former is not None and path.exists():
            remove_folder(former)
            path.rename(former)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
