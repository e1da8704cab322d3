"""scikit-build-core, which leaves the C++ kernels out where CMake, or Ninja and make, are missing.

The override in pyproject.toml does the same where they are there and fail.
"""

from collections.abc import Callable

from scikit_build_core import build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)
from scikit_build_core.errors import NotFoundError

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]
Settings = dict[str, list[str] | str] | None


def _built(hook: Callable[..., str], folder: str, settings: Settings, metadata: str | None) -> str:
    try:
        return hook(folder, settings, metadata)
    except NotFoundError as error:
        print(f"*** {error}: installing without the C++ kernels")
        return hook(folder, {**(settings or {}), "wheel.cmake": "false"}, metadata)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """The hook of PEP 517."""
    return _built(build.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """The hook of PEP 660."""
    return _built(build.build_editable, wheel_directory, config_settings, metadata_directory)
