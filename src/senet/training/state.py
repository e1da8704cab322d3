"""The checkpoints of a run: written while it trains, and gone on from.

`checkpoints/last` is the newest one, `checkpoints/previous` the one before it, `checkpoints/best`
that of the highest top-1. Beside the weights each holds `training_state.pt`, all that is needed to
go on.
"""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from senet.checkpoint.write import defect, write_checkpoint
from senet.data import Preprocessing
from senet.errors import SenetError
from senet.models.description import WEIGHTS, read_described
from senet.support.files import remove_folder
from senet.training.config import RUN_CONFIG

STATE = "training_state.pt"


def save_training_state(
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
        weights, description: see `write_checkpoint`.
        state: tensors in plain containers (loaded with `weights_only=True`).

    Raises:
        SenetError: the disk is full or unwritable; the former checkpoints are intact.
    """
    folder = run / "checkpoints"
    former = folder / ("previous" if slot == "last" else f".{slot}.former")
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    beside = {STATE: buffer.getbuffer()}
    try:
        write_checkpoint(folder / slot, weights, description, beside=beside, former=former)
        if slot != "last":
            remove_folder(former)
    except OSError as error:
        raise SenetError(
            f"cannot write {folder / slot}: {error.strerror or error}; the checkpoint before it "
            f"is intact: free some space, then senet train --resume {run}"
        ) from error


def recorded_preprocessing(run: Path) -> Preprocessing | None:
    """How the run prepared its images so far; None without a readable checkpoint, or unknown."""
    for slot in ("last", "previous"):
        path = run / "checkpoints" / slot
        if path.exists() and defect(path) is None:
            found = read_described(path / WEIGHTS)[0]["preprocessing"]
            return None if found is None else Preprocessing.from_dict(found)
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
            remove_folder(folder / "corrupt")
            path.rename(folder / "corrupt")
    if found:
        raise SenetError(
            f"no intact checkpoint in {folder}; rerun with "
            f"senet train --config {run / RUN_CONFIG} --out NEW_FOLDER"
        )
    return None
