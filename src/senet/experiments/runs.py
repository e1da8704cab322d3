"""What a finished run shows: its history, its confusions and its gates."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from senet.anatomy import excitations
from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.commands.report import gate_batches, gate_classes, readings, ready
from senet.data import ImageData
from senet.gates.record import record_gates
from senet.reports.figures import (
    Gates,
    confusion_matrix,
    gates_per_stage,
    learning_curves,
    neutral_gate,
    predictions,
    save_figure,
    themed,
)
from senet.tasks.classification import Evaluation
from senet.tasks.regression import Regression
from senet.tasks.task import Judgement
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.evaluation import evaluate
from senet.training.loop import RunResult


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def examine(
    checkpoint: Checkpoint, data: ImageData, run: RunConfig, judged: Judgement | None
) -> tuple[NDArray[np.int64], Gates]:
    """Confusion matrix of classes, and mean gates, of a checkpoint on the validation images.

    Args:
        checkpoint: a trained network.
        data: the data it was trained on.
        run: its run, which says on which device and in which precision it is evaluated.
        judged: what an evaluation of it gave already.
    """
    model, loader = ready(checkpoint, data, run)
    if judged is None:
        precision = run.recipe.mixed_precision
        judged = evaluate(model, loader, checkpoint.task, mixed_precision=precision)
    assert isinstance(judged, Evaluation)
    return judged.confusion.numpy(), _mean_gates(model, loader, data)


def _mean_gates(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], data: ImageData
) -> Gates:
    """Mean gates (classes, channels) by block; 0 for empty classes; none without SE blocks.

    Where images have not one class each, all of them are one.
    """
    if not excitations(model):
        return {}
    batches = gate_batches(loader, data)
    blocks = record_gates(model, batches, classes=gate_classes(data)).blocks
    return {name: block.class_mean.nan_to_num(0.0).numpy() for name, block in blocks.items()}


def draw_run(result: RunResult, data: ImageData) -> None:
    """Write the figures of a finished run into its folder.

    Learning curves, the confusion matrix of classes or the predictions of numbers, and for SE
    networks the gates of the last checkpoint.

    Args:
        result: the run.
        data: the data it was trained on.
    """
    run, evaluation = result.run, result.evaluation
    config = RunConfig.from_toml(run / RUN_CONFIG)
    folder = run / "figures"
    label = config.label
    checkpoint = open_checkpoint(run / "checkpoints" / "last")
    task = checkpoint.task
    model, loader = ready(checkpoint, data, config)
    gates = _mean_gates(model, loader, data)
    with themed():
        histories = {label: [read_rows(run / "metrics.csv")]}
        figure = learning_curves(histories, task.judged, task.heading, task.loss_unit)
        save_figure(figure, folder, "learning_curves")
        if isinstance(evaluation, Evaluation):
            figure = confusion_matrix({label: evaluation.confusion.numpy()}, checkpoint.classes)
            save_figure(figure, folder, "confusion_matrix")
        if isinstance(task, Regression):
            given, truth = (each.double().numpy() for each in readings(model, loader, task))
            figure = predictions(truth, given, task.names)
            save_figure(figure, folder, "predictions")
        if gates:
            gate = config.model_options.get("gate", "sigmoid")
            figure = gates_per_stage(gates, gate_classes(data), neutral=neutral_gate(gate))
            save_figure(figure, folder, "gates_per_stage")
