"""A virtual environment that holds PyTorch and what else the core needs, and nothing besides.

Nothing is downloaded or copied: its site-packages holds links to the packages of this environment.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that requirements without extras need, those that they need included."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        absent = requirement.marker and not requirement.marker.evaluate({"extra": ""})
        if absent or name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        waiting += map(Requirement, found[name].requires or ())
    return found


def make_environment(folder: Path, requirements: Iterable[str]) -> tuple[Path, Path]:
    """An environment with the distributions that `requirements` need.

    Args:
        folder: where to make it.
        requirements: as of `[project] dependencies`.

    Returns:
        Its Python, and its site-packages.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    for distribution in needed(requirements).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.is_symlink():  # several may share a namespace
                link.symlink_to(str(distribution.locate_file(top)))
    return Path(sysconfig.get_path("scripts", "venv", paths)) / "python", site
