"""Which files with code this user trusts: those that were named, by their SHA-256."""

import contextlib
import hashlib
import os
from pathlib import Path

from senet.errors import UserError


def check_trusted(name: str, *, named_by: str | None = None) -> None:
    """Remember the file of a network that the user named; refuse one that only a file names.

    Args:
        name: of a network; one that is no `FILE.py:FUNCTION` runs no file.
        named_by: what names it, as errors call it, such as "the checkpoint"; None: the user.

    Raises:
        UserError: a file names it, and this user never named one of this content.
    """
    path = Path(name.rpartition(":")[0])
    if ".py:" not in name or not path.is_file():
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    known = cache / "senet" / "trusted_files"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    trusted = known.read_text().split() if known.is_file() else []
    if digest in trusted or os.environ.get("SENET_TRUST_CODE") == "1":
        return
    if named_by is not None:
        raise UserError(
            f"{named_by} wants to run {path}, which you have not named before with what is in it "
            "now: look at it, and if you trust it, set SENET_TRUST_CODE=1"
        )
    with contextlib.suppress(OSError):  # a read-only home
        known.parent.mkdir(parents=True, exist_ok=True)
        with known.open("a") as file:
            file.write(f"{digest}\n")
