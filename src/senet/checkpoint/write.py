"""Writing a network with all that is needed to use it again, as a checkpoint folder."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from senet.checkpoint.files import MANIFEST
from senet.data import Preprocessing
from senet.errors import UserError
from senet.models.hub import WEIGHTS, described
from senet.support.files import atomic_write, sync_folder


def check_new(out: Path) -> None:
    """Raise UserError where the folder to make exists."""
    if out.exists():
        raise UserError(f"{out} exists and is never overwritten: give another folder by --out")


def write_checkpoint(
    out: Path,
    model: nn.Module,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    *,
    metrics: Mapping[str, float] | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder (weights and manifest, no training state), whole or not at all.

    Args:
        out: folder to make.
        model: with the attribute `config` from which `rebuild` makes it.
        classes: names in the order of the logits; empty where nobody knows them.
        preprocessing: how an image becomes its input.
        metrics: what is known of its accuracy.
        run: options of the run that trained it.
    """
    description = {
        "model": model.config,
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "metrics": dict(metrics or {}),
        "run": dict(run or {}),
    }
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    content = save(state, described(description))
    manifest = {
        WEIGHTS: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        temporary.chmod(0o755)
        atomic_write(temporary / WEIGHTS, content)
        atomic_write(temporary / MANIFEST, json.dumps(manifest, indent=2))
        temporary.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
