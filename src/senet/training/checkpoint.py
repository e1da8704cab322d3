"""Checkpoints: written as a whole or not at all, verified when read, self-contained.

A checkpoint is a folder of three files: `model.safetensors` (the weights to use, with all that
is needed to use them in its metadata), `training_state.pt` (all that is needed to go on) and
`manifest.json` (size and SHA-256 of the others). `checkpoints/last` is the newest one,
`checkpoints/previous` the one before it, `checkpoints/best` that of the highest top-1.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from senet.data import Preprocessing
from senet.errors import SenetError, UserError
from senet.files import sync_folder
from senet.models import Network, build_model

FORMAT, VERSION = "senet", 1
WEIGHTS, STATE, MANIFEST = "model.safetensors", "training_state.pt", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and all that is needed to use it.

    Attributes:
        model: the network with its weights, in evaluation mode, on the CPU.
        classes: names in the order of the logits.
        preprocessing: how an image becomes its input.
        metrics: the row of metrics.csv that belongs to the weights; empty within the first epoch.
        config: the options of the run that its result depends on, see
            `RunConfig.result_options`.
        path: the file that was read.
    """

    model: Network
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    metrics: dict[str, float]
    config: dict[str, Any]
    path: Path


def save_checkpoint(
    run: Path,
    slot: Literal["last", "best"],
    weights: Mapping[str, Tensor],
    description: Mapping[str, Any],
    state: Mapping[str, Any],
) -> None:
    """Write `run/checkpoints/<slot>`; what was "last" becomes "previous".

    At each moment a kill leaves a complete checkpoint, the new or the former one.

    Args:
        run: the run folder.
        slot: which checkpoint.
        weights: state dict of the network as it shall be used.
        description: JSON-able; goes into the metadata of the weights.
        state: tensors in plain containers (loaded with `weights_only=True`).

    Raises:
        SenetError: the disk is full or unwritable; the former checkpoints are intact.
    """
    folder = run / "checkpoints"
    temporary = folder / f".{slot}.tmp"
    former = folder / ("previous" if slot == "last" else f".{slot}.former")
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    # One metadata key only: safetensors writes several in an arbitrary order.
    metadata = {FORMAT: json.dumps({"version": VERSION, **description}, sort_keys=True)}
    files: dict[str, bytes | memoryview] = {
        WEIGHTS: save({k: v.detach().cpu().contiguous() for k, v in weights.items()}, metadata),
        STATE: buffer.getbuffer(),
    }
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            _write(temporary / name, content)
        manifest = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        _write(temporary / MANIFEST, json.dumps(manifest, indent=2).encode())
        sync_folder(temporary)
        if (folder / slot).exists():
            _remove(former)
            (folder / slot).rename(former)
        temporary.rename(folder / slot)
        sync_folder(folder)
        if slot != "last":
            _remove(former)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SenetError(
            f"cannot write {folder / slot}: {error.strerror or error}; the checkpoint before it "
            f"is intact: free some space, then senet train --resume {run}"
        ) from error


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: each file is compared with the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in (WEIGHTS, STATE):
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


def load_training_state(run: Path) -> dict[str, Any] | None:
    """The training state to go on from, or None where a run was killed before its first one.

    Prepares the folder for further writing too: a corrupt "last" is named in one warning and moved
    to `checkpoints/corrupt`, so that it never takes the place of a good "previous".

    Raises:
        SenetError: there are checkpoints, but none is intact.
    """
    folder = run / "checkpoints"
    former = folder / ".best.former"
    if former.exists() and not (folder / "best").exists():  # killed between two renames
        former.rename(folder / "best")
    found = [folder / slot for slot in ("last", "previous") if (folder / slot).exists()]
    for path in found:
        why = defect(path)
        if why is None:
            content = torch.load(path / STATE, map_location="cpu", weights_only=True)
            assert isinstance(content, dict)
            return content
        warnings.warn(f"{path} is corrupt ({why}): it is left out", stacklevel=2)
        if path.name == "last":
            _remove(folder / "corrupt")
            path.rename(folder / "corrupt")
    if found:
        raise SenetError(
            f"no intact checkpoint in {folder}; rerun with "
            f"senet train --config {run / 'config.toml'} --out NEW_FOLDER"
        )
    return None


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """A trained network from a run folder, a checkpoint folder or a model.safetensors.

    Of a run folder it takes the best checkpoint, else the last, else the one before; a corrupt
    one is named in a warning and passed over. Nothing is unpickled.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it is no checkpoint of this package.
        SenetError: it is one, but corrupt.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a run folder, one of its checkpoints, or a {WEIGHTS}"
        )
    if path.is_file():
        return _read(path)
    if (path / WEIGHTS).exists() or (path / MANIFEST).exists():
        candidates = [path]
    else:
        inner = path / "checkpoints"
        candidates = [inner / slot for slot in ("best", "last", "previous")]
        candidates = [folder for folder in candidates if folder.exists()]
    if not candidates:
        raise UserError(
            f"{path} holds no checkpoint: give a run folder with checkpoints/, "
            f"one of its checkpoints, or a {WEIGHTS}"
        )
    for folder in candidates:
        why = defect(folder)
        if why is None:
            return _read(folder / WEIGHTS)
        if folder is not candidates[-1]:
            warnings.warn(f"{folder} is corrupt ({why}): it is left out", stacklevel=2)
    raise SenetError(f"{candidates[-1]} is corrupt ({why})")


def _read(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or is cut short: {error}") from error
    if FORMAT not in metadata:
        raise UserError(
            f"{path} was not written by senet train (no {FORMAT!r} metadata, so no network name "
            "and classes); load plain weights with senet.create_model(NAME, pretrained=PATH)"
        )
    description = json.loads(metadata[FORMAT])
    if description["version"] != VERSION:
        raise UserError(
            f"{path} has format version {description['version']}, this senet reads {VERSION}; "
            "update senet"
        )
    config = description["model"]
    model = build_model(
        config["name"],
        num_classes=config["num_classes"],
        in_channels=config["in_channels"],
        **config["options"],
    )
    model.load_state_dict(weights)
    return Checkpoint(
        model=model.eval(),
        classes=tuple(description["classes"]),
        preprocessing=Preprocessing.from_dict(description["preprocessing"]),
        metrics=description["metrics"],
        config=description["run"],
        path=path,
    )
