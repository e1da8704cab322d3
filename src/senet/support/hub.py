"""Files of the Hugging Face Hub: from the cache, or fetched, or one line at once."""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from senet.errors import UserError


def fetch(repository: str, filename: str, **options: Any) -> Path:
    """The file of a repository, from the cache of this machine or else fetched into it.

    Where it is not in the cache and the Hub cannot be reached, that is said at once: a connection
    that is refused is not tried again for half a minute. A download that breaks off is gone on with
    from where it broke, as long as something comes, and nothing of it stays if it fails.

    The Hub names large files by their SHA-256, and the cache keeps that name: the content is
    compared with it each time, and a file that differs is taken out of the cache.

    Args:
        repository: `owner/name`.
        filename: path within the repository.
        **options: `revision`, `cache_dir`, `token`, … of `huggingface_hub.hf_hub_download`.

    Raises:
        UserError: no such repository or file, no access, no connection and nothing cached, or a
            file that is not what the Hub says.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    revision = options.get("revision")
    # Its bases are those of the HTTP library, which differs between versions of the package.
    bases: tuple[Any, ...] = HfHubHTTPError.__bases__
    refused: tuple[type[Exception], ...] = (HfHubHTTPError, HFValidationError, OSError, *bases)
    try:
        found = try_to_load_from_cache(
            repository, filename, cache_dir=options.get("cache_dir"), revision=revision
        )
        if not isinstance(found, str) and not options.get("local_files_only"):
            url = hf_hub_url(repository, filename, revision=revision)
            get_hf_file_metadata(url, token=options.get("token"))
        with _quiet():
            path = Path(hf_hub_download(repository, filename, **options))
    except refused as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The Hub's own errors say what is wrong in their second line.
        said = lines[: 2 if isinstance(error, HfHubHTTPError) else 1]
        reason = " ".join(said) or type(error).__name__
        raise UserError(
            f"cannot fetch {filename} of {repository} from the Hugging Face Hub: {reason}"
        ) from error
    if not _as_named(path):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise UserError(
            f"{filename} of {repository} is damaged (its SHA-256 is not the one that the Hugging "
            "Face Hub says): it was taken out of the cache, so that another try fetches it anew"
        )
    return path


def address(repository: str, filename: str) -> str:
    """Where a repository's file can be fetched: at the Hub, or at HF_ENDPOINT."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, filename)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the library says of each attempt: the last error tells it."""
    logger = logging.getLogger("huggingface_hub.file_download")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _as_named(path: Path) -> bool:
    """Whether a file of the cache has the SHA-256 that its blob is named by, if it is."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return True  # a small file, named by Git's hash, or a cache without symbolic links
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
