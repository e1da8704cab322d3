"""What a finished run shows: its history, its confusions and its gates."""

import csv
import dataclasses
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .data import ImageData, load_data, val_loader
from .errors import SenetError
from .figures import (
    Gates,
    confusion_matrix,
    gates_per_stage,
    learning_curves,
    save_figure,
    themed,
)
from .hooks import expected_hooks
from .layers import SqueezeExcitation
from .training.checkpoint import Checkpoint, open_checkpoint
from .training.config import CONFIG, RunConfig
from .training.evaluation import evaluate
from .training.loop import choose_device

# Gates that can pass 1, so that 1 = "unchanged" lies inside their range.
CROSSING_ONE = ("identity_sigmoid", "relu")


class GateRecorder:
    """Mean gate of each channel of each SE block, by class; used as a context manager.

    Args:
        model: the network; its blocks are found by their type.
        classes: number of classes.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        self.blocks = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SqueezeExcitation)
        }
        self.classes = classes
        self.labels = torch.empty(0, dtype=torch.long)
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.sums: dict[str, Tensor] = {}
        self.context = ExitStack()

    def __enter__(self) -> "GateRecorder":
        self.context.enter_context(expected_hooks())
        for name, block in self.blocks.items():
            handle = block.gate.register_forward_hook(
                lambda _module, _inputs, output, name=name: self._add(name, output)
            )
            self.context.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self.context.close()

    def follow(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
        """The loader's batches, keeping the labels (N,) of the one in use."""
        for images, labels in loader:
            self.labels = labels
            self.counts += torch.bincount(labels, minlength=self.classes)
            yield images, labels

    def _add(self, name: str, gates: Tensor) -> None:
        """Add the gates (N,C), or (N,*,C) of a block without squeeze, to the sums by class."""
        gates = gates.detach().double().cpu()
        if gates.ndim > 2:
            gates = gates.flatten(1, -2).mean(1)
        if name not in self.sums:
            self.sums[name] = torch.zeros(self.classes, gates.shape[1], dtype=torch.float64)
        self.sums[name].index_add_(0, self.labels, gates)

    def means(self) -> Gates:
        """Mean gates (classes, channels) by block, in the network's order; 0 for empty classes.

        Raises:
            SenetError: a block's gates were never computed.
        """
        for name in self.blocks:
            if name not in self.sums:
                raise SenetError(f"the gates of {name} were not computed in the forward pass")
        counts = self.counts.clamp(min=1)[:, None]
        return {name: (self.sums[name] / counts).numpy() for name in self.blocks}


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
    data = dataclasses.replace(data, preprocessing=checkpoint.preprocessing)
    loader = val_loader(data, batch_size=run.recipe.batch_size, num_workers=run.num_workers)
    model = checkpoint.model.to(choose_device(run.device)).to(memory_format=torch.channels_last)
    with GateRecorder(model, len(checkpoint.classes)) as recorder:
        result = evaluate(
            model,
            recorder.follow(loader),
            checkpoint.classes,
            mixed_precision=run.recipe.mixed_precision,
        )
    return result.confusion.numpy(), recorder.means()


def neutral_gate(gate: str) -> float | None:
    """The value of a gate that leaves a channel unchanged, if the gate can lie on both sides."""
    return 1.0 if gate in CROSSING_ONE else None


def open_run_data(config: RunConfig) -> ImageData:
    """The data of a run, as its training opened them."""
    return load_data(
        config.data,
        root=config.data_root,
        download=config.download,
        val_fraction=config.val_fraction,
        image_size=config.image_size,
        skip_bad_images=config.skip_bad_images,
        shuffle_buffer=config.shuffle_buffer,
        bad_shards=config.bad_shards,
    )


def draw_run(run: Path, confusion: NDArray[np.int64]) -> None:
    """Write the figures of a finished run into its folder.

    Learning curves, the confusion matrix, and for SE networks the gates of the last checkpoint.

    Args:
        run: the run folder.
        confusion: counts (true class, predicted class) of the last epoch.
    """
    config = RunConfig.from_toml(run / CONFIG)
    folder = run / "figures"
    label = Path(config.model).name  # of a network from a file without the file's folder
    checkpoint = open_checkpoint(run / "checkpoints" / "last")
    gates: Gates = {}
    if any(isinstance(module, SqueezeExcitation) for module in checkpoint.model.modules()):
        _, gates = examine(checkpoint, open_run_data(config), config)
    with themed():
        history = read_rows(run / "metrics.csv")
        save_figure(learning_curves({label: [history]}), folder, "learning_curves")
        figure = confusion_matrix({label: confusion}, checkpoint.classes)
        save_figure(figure, folder, "confusion_matrix")
        if gates:
            gate = config.model_options.get("gate", "sigmoid")
            figure = gates_per_stage(gates, checkpoint.classes, neutral=neutral_gate(gate))
            save_figure(figure, folder, "gates_per_stage")
