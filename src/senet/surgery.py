"""Checkpoints with SE inserted or gates folded: what `senet insert` and `senet fold` do."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from senet.data import Preprocessing, val_loader
from senet.errors import UserError
from senet.explain import open_for_gates
from senet.files import atomic_write
from senet.folding import FoldReport, fold_gates
from senet.gate_statistics import GateStatistics
from senet.gates import record_gates
from senet.hub import WEIGHTS, described
from senet.insertion import insert
from senet.insertion_report import InsertionReport
from senet.sources import open_source
from senet.training.checkpoint import MANIFEST, open_checkpoint
from senet.training.loop import choose_device
from senet.training.progress import Progress, Silent
from senet.weights import read_state_dict

# How ImageNet networks of torchvision are evaluated; a checkpoint of this package says its own.
_RESIZE = 256 / 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Inserted:
    """What `insert_checkpoint` wrote.

    Attributes:
        folder: checkpoint folder.
        report: what went where.
    """

    folder: Path
    report: InsertionReport


def insert_checkpoint(
    out: Path,
    *,
    model: str | None = None,
    weights: Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    options: Mapping[str, Any],
) -> Inserted:
    """Insert SE into a network and write it as a checkpoint that every command takes.

    Args:
        out: folder to make; it must not exist.
        model: name for `open_source`; by default that of the checkpoint `weights`.
        weights: checkpoint of this package, or a .safetensors or .pth file of the model's own
            state dict; None: fresh weights.
        num_classes: classes of the model; by default as many as the checkpoint knows, or 1000.
        image_size: side of the images; by default that of the checkpoint or of the model.
        options: of `senet.insert`: where, reduction, stages.

    Raises:
        UserError: a folder that exists, or as for `open_source`, `open_checkpoint` and `insert`;
            nothing is written.
    """
    _check_new(out)
    classes: Sequence[str]
    run: dict[str, Any] = {}
    if model is None:
        if weights is None:
            raise UserError("give a network by --model, or a checkpoint by --weights")
        checkpoint = open_checkpoint(weights)
        network: nn.Module = checkpoint.model
        classes, preprocessing = checkpoint.model.classes or (), checkpoint.preprocessing
        run = checkpoint.config
        if num_classes not in (None, len(checkpoint.classes)) or image_size is not None:
            raise UserError(f"{weights} knows its own classes and image size: leave them out")
    else:
        network = open_source(model, num_classes=num_classes or 1000)
        size: Any = network.input_size
        side = int(image_size or size[1])
        preprocessing = Preprocessing(
            image_size=side,
            resize=round(side * _RESIZE),
            mean=_MEAN,
            std=_STD,
            channels=int(size[0]),
            interpolation="bilinear",
        )
        if weights is not None:
            _load(network, weights)
        classes = ()  # nobody knows their names
    side = preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, preprocessing.channels, side, side, generator=generator)
    report = insert(network.eval(), example_input=example, **options)
    write_checkpoint(out, network, classes, preprocessing, run=run)
    return Inserted(out, report)


def _load(network: nn.Module, weights: Path) -> None:
    state = read_state_dict(weights)
    own = network.state_dict()
    different = sorted(own.keys() ^ state.keys())
    different += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if different:
        raise UserError(
            f"weights {weights} do not fit the model: {different[0]} differs "
            f"({len(different)} in all); is it the same network with as many classes?"
        )
    network.load_state_dict(state)


@dataclass(frozen=True)
class Folded:
    """What `fold_checkpoint` wrote.

    Attributes:
        folder: checkpoint folder.
        report: what was folded, and the network before and after.
        images: number of images it was judged on.
    """

    folder: Path
    report: FoldReport
    images: int


def fold_checkpoint(
    path: Path,
    out: Path,
    data_name: str | None,
    data_options: Mapping[str, Any],
    *,
    tolerance: float,
    max_drop: float,
    partial: bool = True,
    statistics: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Folded:
    """Fold the gates of a checkpoint that hardly move, and write what is left.

    Args:
        path: run folder, checkpoint folder or model.safetensors.
        out: folder to make; it must not exist.
        data_name: data set or folder; by default that of the training.
        data_options: how data are read, see `open_for_gates`.
        tolerance: largest standard deviation of a gate that is folded.
        max_drop: most top-1 in percentage points that may be lost on the validation images.
        partial: also fold some gates of blocks where others move, see `fold_gates`.
        statistics: of `senet explain` or `GateStatistics.save`; recorded anew by default.
        batch_size: images at a time.
        workers: processes that read images.
        device: "auto", "cpu", "cuda" or "mps".
        progress: hears of each batch.

    Raises:
        UserError: a folder that exists, statistics of another network, or as for
            `open_for_gates` and `fold_gates`; nothing is written.
    """
    _check_new(out)
    options = dict(data_options)
    known = None if statistics is None else GateStatistics.load(statistics)
    checkpoint, data = open_for_gates(path, data_name, options, options.get("image_size"))
    loader = val_loader(data, batch_size=batch_size, num_workers=workers)
    model = checkpoint.model.to(choose_device(device))
    progress = progress or Silent()
    if known is None:
        progress.begin_evaluation(len(loader))
        known = record_gates(
            model, loader, classes=checkpoint.classes, top=1, seen=progress.evaluated
        )
    report = fold_gates(
        model, known, tolerance=tolerance, loader=loader, max_drop=max_drop, partial=partial
    )
    metrics = {"top1": report.after.top1, "val_loss": report.after.loss}
    write_checkpoint(
        out,
        report.model.cpu(),
        checkpoint.model.classes or (),
        checkpoint.preprocessing,
        metrics={key: value for key, value in metrics.items() if value is not None},
        run=checkpoint.config,
    )
    return Folded(out, report, len(data.val))


def _check_new(out: Path) -> None:
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
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
