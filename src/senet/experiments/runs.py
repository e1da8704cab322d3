"""What a finished run shows: its history, its confusions and its gates."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from senet.anatomy import excitations
from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.commands.report import ready
from senet.data import ImageData
from senet.gates.record import record_gates
from senet.reports.figures import (
    Gates,
    confusion_matrix,
    gates_per_stage,
    learning_curves,
    neutral_gate,
    save_figure,
    themed,
)
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.evaluation import evaluate


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def examine(
    checkpoint: Checkpoint, data: ImageData, run: RunConfig
) -> tuple[NDArray[np.int64], Gates]:
    """Confusion matrix and mean gates of a checkpoint on the validation images.

    Args:
        checkpoint: a trained network.
        data: the data it was trained on.
        run: its run, which says on which device and in which precision it is evaluated.
    """
    model, loader = ready(checkpoint, data, run)
    result = evaluate(model, loader, checkpoint.classes, mixed_precision=run.recipe.mixed_precision)
    return result.confusion.numpy(), _mean_gates(model, loader, checkpoint.classes)


def _mean_gates(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str]
) -> Gates:
    """Mean gates (classes, channels) by block; 0 for empty classes; none without SE blocks."""
    if not excitations(model):
        return {}
    blocks = record_gates(model, loader, classes=classes).blocks
    return {name: block.class_mean.nan_to_num(0.0).numpy() for name, block in blocks.items()}


def draw_run(run: Path, confusion: NDArray[np.int64], data: ImageData) -> None:
    """Write the figures of a finished run into its folder.

    Learning curves, the confusion matrix, and for SE networks the gates of the last checkpoint.

    Args:
        run: the run folder.
        confusion: counts (true class, predicted class) of the last epoch.
        data: the data it was trained on.
    """
    config = RunConfig.from_toml(run / RUN_CONFIG)
    folder = run / "figures"
    label = config.label
    checkpoint = open_checkpoint(run / "checkpoints" / "last")
    gates: Gates = {}
    if excitations(checkpoint.model):
        model, loader = ready(checkpoint, data, config)
        gates = _mean_gates(model, loader, checkpoint.classes)
    with themed():
        history = read_rows(run / "metrics.csv")
        save_figure(learning_curves({label: [history]}), folder, "learning_curves")
        figure = confusion_matrix({label: confusion}, checkpoint.classes)
        save_figure(figure, folder, "confusion_matrix")
        if gates:
            gate = config.model_options.get("gate", "sigmoid")
            figure = gates_per_stage(gates, checkpoint.classes, neutral=neutral_gate(gate))
            save_figure(figure, folder, "gates_per_stage")
