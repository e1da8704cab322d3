"""Data from folders of images, one folder a class."""

import unicodedata
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

from senet.data.image_data import ImageData, Reading
from senet.data.sources.files import Labelled, load_files, shortened
from senet.data.splits import Split, evaluated, known_splits, split_of
from senet.data.walk import has_images, image_files, names_below, subfolders
from senet.errors import UserError
from senet.support.text import printable


def load_folder(data: str, reading: Reading) -> ImageData:
    """`senet.data.load_data` for a folder."""
    folder, name = Path(data), printable(data)
    splits = _splits(folder)
    val = evaluated(splits, reading.split, name)
    if val is not None and "train" not in splits and not reading.whole:
        raise UserError(f"{name} has {val[0]}/ but no train/: add train/")
    if val is not None and reading.val_fraction is not None:
        raise UserError(f"{name} has {val[0]}/: leave out val_fraction {reading.val_fraction}")
    # Where all is for evaluation, a test/ alone will do; a train/ alone must be asked for.
    train = splits.get("train") or val or (folder.name, folder)
    if "train" in splits:
        reading = replace(reading, whole=False, classes=None)
    scanned = _scan(train[1])
    labelled = _labelled(train[1], scanned)
    judged = None
    if val is not None:
        judged = labelled if val == train else _labelled(val[1], _scan(val[1]))
    return load_files(name, labelled, judged, reading, reading.classes or tuple(sorted(scanned)))


def takes(folder: Path, place: Path) -> Path | None:
    """The folder whose content is read as images, if a new one at `place` would lie in it.

    Args:
        folder: data as `load_folder` takes them.
        place: a folder that is not there yet.

    Raises:
        UserError: as for `_splits`.
    """
    splits = _splits(folder)
    read = [path for _, path in splits.values()] or [folder]
    # A class may be a link to a folder elsewhere.
    for path in [*read, *(below for each in read for below in subfolders(each))]:
        if names_below(place, path):
            return path
    names = names_below(place, folder)
    return folder if names and split_of(names[0]) else None


def _splits(folder: Path) -> dict[Split, tuple[str, Path]]:
    """The folders of splits; a folder of that name with images in it may be a class.

    Raises:
        UserError: two folders for the same split, or folders that look like another level.
    """
    inside = {path.name: path for path in subfolders(folder)}
    found = {name: path for name, path in inside.items() if subfolders(path)}
    splits = known_splits(found, printable(str(folder)))
    flat = [path for name, path in inside.items() if name not in found and split_of(name)]
    if flat and (len(flat) == len(inside) or (splits and split_of(flat[0].name) == "train")):
        raise UserError(
            f"{printable(str(flat[0]))} has no class folders: it needs one folder of images a class"
        )
    for name, path in inside.items() if not splits else ():
        below = subfolders(path)
        trains = any(split_of(inner.name) == "train" and subfolders(inner) for inner in below)
        if trains or (len(inside) == 1 and below and not has_images(path)):
            raise UserError(
                f"{printable(str(folder))} lies one level too high: give "
                f"{printable(str(folder / name))}, which holds "
                f"{shortened([printable(inner.name) for inner in below])}"
            )
    return splits


def _scan(folder: Path) -> dict[str, list[str]]:
    """The image files of each class, by its name in Unicode's composed form (NFC).

    macOS hands out names in decomposed form: the same name, other bytes.
    """
    classes: dict[str, list[str]] = {}
    unread: Counter[str] = Counter()
    for path in subfolders(folder):
        name = unicodedata.normalize("NFC", printable(path.name))
        if name in classes:
            raise UserError(
                f"{printable(str(folder))} has two folders that are both called {name!r}, in "
                "different Unicode forms: put their images into one"
            )
        classes[name] = image_files(path, unread)
    if not classes:
        raise UserError(
            f"{printable(str(folder))} has no class folders: it needs one folder of images a class"
        )
    if unread:
        kinds = ", ".join(f"{count} {ending}" for ending, count in unread.most_common())
        warnings.warn(
            f"{printable(str(folder))}: pictures in formats that are not read are left out: "
            f"{kinds}; convert them to PNG or JPEG to use them",
            stacklevel=4,
        )
    return classes


def _labelled(folder: Path, classes: dict[str, list[str]]) -> Labelled:
    names = sorted(classes)
    return Labelled(
        printable(str(folder)),
        [path for name in names for path in classes[name]],
        [name for name in names for _ in classes[name]],
    )
