"""Places are tried before the work, and nothing stays of that."""

import re
from pathlib import Path

import pytest

from senet.errors import UserError
from senet.support.places import check_file, check_folder, check_new_folder


def test_what_can_be_written_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("former")
    (tmp_path / "folder").mkdir()
    for name in ("file", "new"):
        check_file(tmp_path / name, "--csv")
    for name in ("folder", "new", "new/er"):
        check_folder(tmp_path / name, "--figures")
    for name in ("new", "new/er/run"):
        check_new_folder(tmp_path / name, "folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "former"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/x", "there is no folder {}/missing; make it or give another place"),
        ("folder", "it is a folder; give a file"),
        ("file/x", "{}/file is not a folder; give another place"),
        ("n" * 250, "{} does not take it (File name too long); give another place"),
        ("n" * 300, "{} does not take it (File name too long); give another place"),
    ],
)
def test_files_that_cannot_be_written(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    said = re.escape(f"--csv {tmp_path / name}: {words.format(tmp_path)}")
    with pytest.raises(UserError, match=f"^{said}$"):
        check_file(tmp_path / name, "--csv")


@pytest.mark.parametrize("name", ["file", "file/x", "file/x/y", "n" * 300 + "/x"])
def test_folders_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--figures .* give another folder$"):
        check_folder(tmp_path / name, "--figures")
    with pytest.raises(UserError, match=rf"folder {tmp_path}/{name}.* give another .*by --out"):
        check_new_folder(tmp_path / name, "run folder")


def test_what_permissions_do_not_tell() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc")
    with pytest.raises(UserError, match="--csv /proc/x: /proc does not take it"):
        check_file(Path("/proc/x"), "--csv")
    with pytest.raises(UserError, match="cannot make folder /proc/x/y: /proc does not take it"):
        check_new_folder(Path("/proc/x/y"), "folder")
