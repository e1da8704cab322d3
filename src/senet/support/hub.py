"""Files of the Hugging Face Hub: from the cache, or fetched, or one line at once."""

from pathlib import Path
from typing import Any

from senet.errors import UserError


def fetch(repository: str, filename: str, **options: Any) -> Path:
    """The file of a repository, from the cache of this machine or else fetched into it.

    Where it is not in the cache and the Hub cannot be reached, that is said at once: a connection
    that is refused is not tried again for half a minute.

    Args:
        repository: `owner/name`.
        filename: path within the repository.
        **options: `revision`, `cache_dir`, `token`, … of `huggingface_hub.hf_hub_download`.

    Raises:
        UserError: no such repository or file, no access, or no connection and nothing cached.
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
        return Path(hf_hub_download(repository, filename, **options))
    except refused as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"cannot fetch {filename} of {repository} from the Hugging Face Hub: {reason}"
        ) from error
