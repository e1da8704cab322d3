"""Files of the Hub without a connection: one line, at once."""

import socket
import time
from pathlib import Path

import pytest

from senet.errors import UserError
from senet.support.hub import fetch


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A Hub at a port of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        place + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return place


@pytest.mark.usefixtures("refused")
def test_a_refused_connection_is_one_line_at_once(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cannot fetch a\.txt of owner/name.*efused") as said:
        fetch("owner/name", "a.txt")
    assert time.monotonic() - began < 10  # Five attempts take 23 s.
    assert "\n" not in str(said.value)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("refused")
def test_what_is_in_the_cache_needs_no_connection(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a.txt").write_text("content")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    assert fetch("owner/name", "a.txt").read_text() == "content"


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="of a/b/c from the Hugging Face Hub"):
        fetch("a/b/c", "a.txt")
