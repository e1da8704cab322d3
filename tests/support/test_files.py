"""Files and folders appear as a whole or not at all, and reach the disk in a safe order."""

import os
from pathlib import Path

import pytest

from senet.support import files
from senet.support.files import atomic_file, atomic_folder, atomic_write, durable_write


def fill(path: Path, content: str, former: Path | None = None) -> None:
    with atomic_folder(path, former=former) as folder:
        durable_write(folder / "inside", content.encode())


def test_atomic_file_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    assert path.stat().st_mode & 0o777 == 0o644

    def interrupted() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == "é".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "above" / "folder"
    fill(path, "new")
    assert (path / "inside").read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o755
    with pytest.raises(OSError, match="not empty"):
        fill(path, "other")
    assert (path / "inside").read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_nothing_stays_of_a_folder_that_failed(tmp_path: Path) -> None:
    def interrupted(former: Path | None) -> None:
        with atomic_folder(tmp_path / "folder", former=former) as folder:
            (folder / "inside").touch()
            raise KeyboardInterrupt

    for former in (None, tmp_path / "former"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(former)
    assert list(tmp_path.iterdir()) == []


def test_replaced_folder_is_kept_as_the_former_one(tmp_path: Path) -> None:
    path, former = tmp_path / "folder", tmp_path / "former"
    left = tmp_path / ".folder.tmp"
    left.mkdir()
    (left / "of a kill").touch()
    for content in ("1", "2", "3"):
        fill(path, content, former)
    assert [p.name for p in path.iterdir()] == ["inside"]
    assert ((path / "inside").read_text(), (former / "inside").read_text()) == ("3", "2")
    assert sorted(tmp_path.iterdir()) == [path, former]


def test_order_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, their folder, the renames, the folder above: a power cut leaves one or the other."""
    fill(tmp_path / "folder", "old")
    done: list[str] = []
    fsync, rename, sync_folder = os.fsync, Path.rename, files.sync_folder
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(
        Path, "rename", lambda a, b: (done.append(f"{a.name} > {b.name}"), rename(a, b))[1]
    )
    monkeypatch.setattr(
        files, "sync_folder", lambda path: (done.append(f"folder {path.name}"), sync_folder(path))
    )
    fill(tmp_path / "folder", "new", tmp_path / "former")
    assert done == [
        "fsync",
        "folder .folder.tmp",
        "fsync",
        "folder > former",
        ".folder.tmp > folder",
        f"folder {tmp_path.name}",
        "fsync",
    ]


def test_errors_name_the_place_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError) as missing:
        atomic_write(path, "x")
    assert missing.value.filename == str(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as folder:
        atomic_write(tmp_path / "folder", "x")
    assert (folder.value.filename, folder.value.filename2) == (str(tmp_path / "folder"), None)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
