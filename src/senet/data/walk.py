"""Image files below a folder: each once, and nothing that only looks like one."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from senet.data.images import endings
from senet.errors import UserError

# What systems, archives and editors leave beside pictures (macOS, Synology, QNAP, Windows, ext4).
_JUNK = frozenset(
    {"__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin",
     "system volume information", "lost+found", "__pycache__"}
)  # fmt: skip
_UNREAD = frozenset(
    {".arw", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".jxl", ".nef", ".orf",
     ".psd", ".raf", ".raw", ".rw2", ".svg", ".xcf"}
)  # fmt: skip
"""Endings of pictures that are not read: to be told of, not passed over in silence."""


def is_junk(name: str) -> bool:
    """Whether a file or folder is no data: hidden (`._x`, `.ipynb_checkpoints`), or a system's."""
    return name.startswith(".") or name.casefold() in _JUNK


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without junk."""
    above = _above(folder) | {_identity(folder)}  # a link back is a loop, and no folder of its own
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_junk(entry.name)]
    return [folder / name for name in sorted(names) if _identity(folder / name) not in above]


def names_below(place: Path, folder: Path) -> tuple[str, ...]:
    """The names that lead from a folder to a place in it; none where it is elsewhere, or junk."""
    target, top = Path(os.path.realpath(place)), Path(os.path.realpath(folder))
    names = target.relative_to(top).parts if target.is_relative_to(top) else ()
    return () if any(map(is_junk, names)) else names


def has_images(folder: Path) -> bool:
    """Whether image files lie in the folder itself."""
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) and entry.is_file() for entry in entries)


def image_files(folder: Path, unread: Counter[str] | None = None) -> list[str]:
    """All image files below a folder, sorted within each.

    Links are followed; a folder that was seen, or that the search lies in, is not entered again.

    Args:
        folder: where to look.
        unread: counts, by their endings, the pictures in formats that are not read.
    """
    found = []
    for place, names in sorted(_walk(folder)):
        found += [os.path.join(place, name) for name in sorted(names) if _is_image(name)]  # noqa: PTH118
        if unread is not None:
            unread.update(e for e in map(_ending, names) if e in _UNREAD)
    return found


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    seen = _above(top)
    for place, folders, names in os.walk(top, followlinks=True, onerror=_refuse):
        identity = _identity(place)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not is_junk(name))
        yield place, [name for name in names if not is_junk(name)]


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename!r}: {error.strerror}") from error


def _above(folder: Path) -> set[tuple[int, int]]:
    return {_identity(parent) for parent in Path(os.path.realpath(folder)).parents}


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    state = os.stat(folder)  # noqa: PTH116 - a name of any bytes
    return state.st_dev, state.st_ino


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _is_image(name: str) -> bool:
    return not is_junk(name) and _ending(name) in endings()
