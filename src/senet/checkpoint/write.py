"""The one writer of checkpoints: a folder of weights, what else belongs to them, and a manifest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from senet.models.description import WEIGHTS, pack_described
from senet.support.files import atomic_folder, durable_write

MANIFEST = "manifest.json"


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    description: Mapping[str, Any],
    *,
    beside: Mapping[str, bytes | memoryview] | None = None,
    former: Path | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        folder: to make.
        weights: state dict of the network as it shall be used.
        description: from `senet.models.description.describe`; its `model` is what
            `senet.checkpoint.files.rebuild` makes the network from.
        beside: further files by name, such as the state to train on from.
        former: see `atomic_folder`.

    Raises:
        OSError: the disk is full or unwritable; what was there still is.
    """
    files = {WEIGHTS: pack_described(weights, description), **(beside or {})}
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    with atomic_folder(folder, former=former) as temporary:
        for name, content in files.items():
            durable_write(temporary / name, content)
        durable_write(temporary / MANIFEST, json.dumps(manifest, indent=2).encode())


def defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: each file is compared with the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        # A run's checkpoint names its training state too, one of `senet insert` has none.
        for name in dict.fromkeys((WEIGHTS, *manifest)):
            path, expected = folder / name, manifest[name]
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is unreadable ({type(error).__name__})"
    return None
