"""What `senet fold` does: a checkpoint whose constant gates are folded away."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senet.checkpoint.write import write_checkpoint
from senet.commands.explain import open_for_gates
from senet.data import val_loader
from senet.data.image_data import only_classes
from senet.gates.fold import FoldReport, fold_gates
from senet.gates.record import record_gates
from senet.gates.statistics import GateStatistics
from senet.models.description import describe
from senet.support.device import choose_device
from senet.support.places import check_new_folder
from senet.support.progress import Progress, Silent


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
    path: Path | None,
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
    model: str | None = None,
    progress: Progress | None = None,
) -> Folded:
    """Fold the gates of a checkpoint that hardly move, and write what is left.

    Args:
        path: checkpoint, or weights of `model`, see `open_for_gates`.
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
        model: a network by name, see `open_for_gates`.
        progress: hears of each batch.

    Raises:
        UserError: a folder that exists or cannot be made, statistics of another network, or as for
            `open_for_gates` and `fold_gates`; nothing is written.
    """
    check_new_folder(out, "checkpoint folder")
    options = dict(data_options)
    known = None if statistics is None else GateStatistics.load(statistics)
    checkpoint, data = open_for_gates(
        path, data_name, options, options.get("image_size"), model=model
    )
    instead = "fold in Python by senet.fold_gates, without max_drop"
    only_classes(data, "senet fold judges by top-1 of classes", instead)
    loader = val_loader(data, batch_size=batch_size, num_workers=workers)
    network = checkpoint.model.to(choose_device(device))
    progress = progress or Silent()
    if known is None:
        progress.begin_evaluation(len(loader))
        known = record_gates(
            network, loader, classes=checkpoint.classes, top=1, seen=progress.evaluated
        )
    report = fold_gates(
        network, known, tolerance=tolerance, loader=loader, max_drop=max_drop, partial=partial
    )
    metrics = {"top1": report.after.top1, "val_loss": report.after.loss}
    folded, config = report.model.cpu(), report.model.config
    description = describe(
        config,  # type: ignore[arg-type]  # checkpoints hold networks with one
        checkpoint.preprocessing.to_dict(),
        checkpoint.model.classes,
        metrics={key: value for key, value in metrics.items() if value is not None},
        task=checkpoint.task.to_dict(),
        run=checkpoint.config,
    )
    write_checkpoint(out, folded.state_dict(), description)
    return Folded(out, report, len(data.val))
