"""Places that a command writes at its end, tried before it works."""

import os
import tempfile
from pathlib import Path

from senet.errors import UserError


def check_new_folder(folder: Path, what: str, remedy: str = "give another one by --out") -> None:
    """See that a folder does not exist and can be made.

    Args:
        folder: to make, by `atomic_folder`.
        what: it is, for the error, such as "run folder".
        remedy: for a folder that exists.

    Raises:
        UserError: it exists or cannot be made.
    """
    if os.path.lexists(folder):
        raise UserError(f"{what} {folder} exists and is never overwritten: {remedy}")
    _try(folder, f"cannot make {what} {folder}", "give another place by --out")


def check_folder(folder: Path, flag: str) -> None:
    """See that a folder is one that files can be written into, or can be made.

    Args:
        folder: to write into.
        flag: that gave it, for the error.

    Raises:
        UserError: it is a file, or cannot be made or written into.
    """
    _try(folder / "x", f"{flag} {folder}", "give another folder")


def check_file(file: Path, flag: str) -> None:
    """See that a file can be written by `atomic_write`, whether it is there already or not.

    Args:
        file: to write.
        flag: that gave it, or what it is, for the error.

    Raises:
        UserError: it is a folder, or its own is missing or cannot be written into.
    """
    said = f"{flag} {file}"
    if os.path.isdir(file):  # noqa: PTH112 - a name that is too long is told below
        raise UserError(f"{said}: it is a folder; give a file")
    if not os.path.lexists(file.parent):
        raise UserError(f"{said}: there is no folder {file.parent}; make it or give another place")
    _try(file, said, "give another place")


def _try(path: Path, said: str, remedy: str) -> None:
    """Make a hidden file in the nearest folder above that is there, and remove it again.

    Permissions alone would not tell: file systems that are read-only or full, and /proc, refuse
    what they allow.
    """
    above = path.absolute()
    names = [above.name]
    while not os.path.lexists(above.parent):
        above = above.parent
        names.append(above.name)
    folder = above.parent
    if not folder.is_dir():
        raise UserError(f"{said}: {folder} is not a folder; {remedy}")
    longest = max(names, key=lambda name: len(os.fsencode(name)))
    try:
        # As long a name as the writing will take.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{longest}.", suffix=".tmp"):
            pass
    except OSError as error:
        why = f"{folder} does not take it ({error.strerror})"
        raise UserError(f"{said}: {why}; {remedy}") from error
