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
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from senet.data import Preprocessing
from senet.errors import SenetError, UserError
from senet.models import Network, build_model
from senet.models.hub import CONFIG, FORMAT, WEIGHTS, adopt, described, read_described
from senet.networks.anywhere import rebuild
from senet.support.files import sync_folder
from senet.weights import HUB_PREFIX, load_weights, local_file
from senet.weights.files import UNREADABLE, read_contents
from senet.weights.layouts import detect
from senet.weights.select import select

STATE, MANIFEST = "training_state.pt", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and all that is needed to use it.

    Attributes:
        model: the network with its weights, in evaluation mode, on the CPU; with `preprocessing`,
            `classes` and `metrics`, so that `model.save_pretrained` tells them too.
        classes: names in the order of the logits; their numbers where nobody knows the names
            (`model.classes` is None then).
        preprocessing: how an image becomes its input.
        metrics: the row of metrics.csv that belongs to the weights; empty within the first epoch.
        config: the options of the run that its result depends on, see
            `RunConfig.result_options`; empty for a network that is not of a run folder.
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
    metadata = described(description)
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
    """A trained network: a run folder, a checkpoint folder, a model.safetensors, or published.

    Published ones are folders that `save_pretrained` made, and `hf_hub:owner/name`. Of a run
    folder it takes the best checkpoint, else the last, else the one before; a corrupt
    one is named in a warning and passed over. Nothing is unpickled.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it is no checkpoint of this package.
        SenetError: it is one, but corrupt.
    """
    if str(path).startswith(HUB_PREFIX):
        return _read(local_file(str(path)))
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a run folder, one of its checkpoints, or a {WEIGHTS}"
        )
    if path.is_file():
        return _read(path)
    if (path / CONFIG).exists() and (path / WEIGHTS).exists():
        return _read(path / WEIGHTS)  # save_pretrained writes no manifest
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
    description, weights = read_described(path)
    try:
        model = rebuild(description["model"])
        model.load_state_dict(weights)
        adopt(model, description)
        # A foreign network (see `rebuild`) has the attributes of ours that are needed.
        return _checkpoint(cast(Network, model), description["run"], path)
    except SenetError:
        raise
    except (ArithmeticError, *UNREADABLE) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{path} is damaged: its weights and its description do not go together ({reason})"
        ) from error


def _checkpoint(model: Network, run: dict[str, Any], path: Path) -> Checkpoint:
    if model.preprocessing is None:
        raise UserError(
            f"{path} does not say how an image becomes the network's input: open it in Python, set "
            "model.preprocessing, and write it with model.save_pretrained(FOLDER)"
        )
    count = model.config["num_classes"]
    if not count:
        raise UserError(f"{path} holds a network without classes: it cannot be used to classify")
    return Checkpoint(
        model=model.eval(),
        classes=model.classes or tuple(map(str, range(count))),
        preprocessing=Preprocessing.from_dict(model.preprocessing),
        metrics=dict(model.metrics or {}),
        config=run,
        path=path,
    )


def is_described(path: str | PathLike[str]) -> bool:
    """Whether a checkpoint says itself which network it is for; other files hold weights alone.

    Args:
        path: a file, a folder, or `hf_hub:owner/name`.
    """
    if str(path).startswith(HUB_PREFIX):
        path = local_file(str(path))
    path = Path(path)
    if not path.is_file():
        return True  # a folder, which holds what this package wrote
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True  # whoever opens it says what is wrong


def model_for_weights(
    name: str, source: str | PathLike[str], *, fresh_head: bool = False, **options: Any
) -> Network:
    """A network of a given name with weights from elsewhere, in any layout.

    The images' channels and the number of classes are those of the weights. Nothing is unpickled.

    Args:
        name: one of `senet.list_models()`.
        source: a file or `hf_hub:owner/name`, see `senet.weights.read_state_dict`.
        fresh_head: take weights without a last layer that fits, and give the network a fresh one
            for 1,000 classes.
        **options: of the network, see `create_model`.

    Raises:
        UserError: unknown name, weights that do not fit, or that say themselves which network they
            are for.
    """
    with torch.device("meta"):
        outline = build_model(name, **options)
    contents = read_contents(local_file(source))
    if contents.description:
        raise UserError(f"{source} says itself which network it is for: leave out --model {name}")
    state = select(contents.state, outline).state
    decoded = detect(state).decode(state, outline)
    # Where these are not in the file, `load_weights` tells what is wrong with it.
    head = decoded.get(f"{outline.head}.weight")
    first = next(n for n, m in outline.named_modules() if isinstance(m, nn.Conv2d))
    stem = decoded.get(f"{first}.weight")
    model = build_model(
        name,
        num_classes=1000 if head is None else head.shape[0],
        in_channels=3 if stem is None else stem.shape[1],
        **options,
    )
    load_weights(model, contents.state, new_head=fresh_head and head is None)
    return model


def open_weights(name: str, source: str | PathLike[str]) -> Checkpoint:
    """A network of a given name with weights from elsewhere, ready to classify.

    The preprocessing is what the weights' layout implies. Arguments as in `model_for_weights`.

    Raises:
        UserError: as there, weights without a last layer, or a layout that does not tell how images
            are prepared.
    """
    path = local_file(source)
    model = model_for_weights(name, path)
    return _checkpoint(model, {}, path)
