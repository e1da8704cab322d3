"""Explain a checkpoint's gates: statistics, figures, tables and the report, from a data set."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from senet.checkpoint.files import Checkpoint
from senet.commands.evaluate import check_classes, open_data
from senet.commands.network import open_network
from senet.commands.report import gate_batches, gate_classes
from senet.data import ImageData, map_style, val_loader
from senet.data.images import displayed
from senet.data.labels import Target
from senet.errors import UserError
from senet.gates.record import record_gates
from senet.gates.statistics import GateStatistics
from senet.reports.figures import (
    gates_per_stage,
    gates_spread,
    neutral_gate,
    save_figure,
    themed,
)
from senet.reports.gates import explain_page
from senet.support.device import choose_device
from senet.support.files import atomic_folder, atomic_write
from senet.support.places import check_new_folder
from senet.support.progress import Progress, Silent

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_SPREAD = 3  # more bands can no longer be told apart; fig. 7 of the paper has two


@dataclass(frozen=True)
class Explanation:
    """What `explain` wrote, and from what.

    Attributes:
        folder: where.
        statistics: of the gates.
        data: the images.
        checkpoint: the network.
    """

    folder: Path
    statistics: GateStatistics
    data: ImageData
    checkpoint: Checkpoint

    def truth(self, target: Target) -> str:
        """What an image of the data is, in words."""
        if isinstance(target, int):  # by the data's names: those of a network may be others
            return self.data.classes[target]
        return self.checkpoint.task.truth(target)


def open_for_gates(
    path: Path | None,
    data_name: str | None,
    data_options: Mapping[str, Any],
    image_size: int | None,
    *,
    model: str | None = None,
    num_classes: int | None = None,
) -> tuple[Checkpoint, ImageData]:
    """A network and the images to watch or judge it on, prepared as the network's are.

    Args:
        path: run folder, checkpoint folder or model.safetensors; with `model` its own state dict
            as .safetensors or .pth, or None for fresh weights.
        data_name: data set or folder; by default that of the training.
        data_options: further fields of `RunConfig` that say how data are read.
        image_size: side of the input instead of the checkpoint's.
        model: name for `senet.networks.anywhere.open_source`.
        num_classes: of that model; by default as many as the data have.

    Raises:
        UserError: unknown data, or classes that are not the checkpoint's.
    """
    if model is None:
        checkpoint = open_network(None, path)
        data = open_data(checkpoint, data_name, data_options)
    else:
        data = open_data(None, data_name, data_options)
        checkpoint = open_network(model, path, num_classes=num_classes, classes=data.classes)
    if num_classes is None:
        check_classes(checkpoint, data)
    preprocessing = checkpoint.preprocessing
    if image_size is not None:
        preprocessing = preprocessing.resized(image_size)
    return checkpoint, dataclasses.replace(data, preprocessing=preprocessing)


def explain(
    path: Path | None,
    out: Path,
    data_name: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    *,
    classes: Sequence[str] = (),
    images: int = 400,
    top: int = 9,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    model: str | None = None,
    num_classes: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Record the gates of a network over the validation images and write what they show.

    The folder `out` gets report.html, figures/gates_by_class and figures/gates_spread (figures 6
    and 7 of the paper) as PNG and SVG, gates.csv (a row a channel), gates_by_class.csv (a row a
    channel and class) and statistics.safetensors (for `senet fold`).

    Args:
        path: checkpoint, or weights of `model`, see `open_for_gates`.
        out: folder to make; it must not exist.
        data_name: data set or folder; by default that of the training.
        data_options: how data are read, see `open_for_gates`.
        classes: names of classes to draw; by default evenly chosen ones.
        images: most images in the report.
        top: images kept for each channel.
        batch_size: images at a time.
        workers: processes that read images.
        device: "auto", "cpu", "cuda" or "mps".
        model: a network by name, see `open_for_gates`.
        num_classes: its outputs, where they are not the classes of the data; gates are shown by
            the data's classes all the same.
        progress: hears of each batch.

    Raises:
        UserError: a folder that exists or cannot be made, unknown classes, or as for
            `open_for_gates` and `record_gates`; nothing is written.
    """
    check_new_folder(out, "folder")
    if images < 0:
        raise UserError(f"images must be at least 0, got {images}")
    options = dict(data_options or {})
    checkpoint, data = open_for_gates(
        path, data_name, options, options.get("image_size"), model=model, num_classes=num_classes
    )
    map_style(data.val, "senet explain")
    loader = val_loader(data, batch_size=batch_size, num_workers=workers)
    names = gate_classes(data)
    named = GateStatistics({}, names, 0)
    picked = [named.class_number(name) for name in classes]
    network = checkpoint.model.to(choose_device(device))
    progress = progress or Silent()
    progress.begin_evaluation(len(loader))
    statistics = record_gates(
        network, gate_batches(loader, data), classes=names, top=top, seen=progress.evaluated
    )
    explanation = Explanation(out, statistics, data, checkpoint)
    _write(explanation, picked, images)
    return explanation


def _write(explanation: Explanation, picked: list[int], images: int) -> None:
    """All files, or none."""
    out, statistics = explanation.folder, explanation.statistics
    with atomic_folder(out) as temporary:
        with themed():
            shown = picked or _evenly(statistics)
            save_figure(_by_class(statistics, picked), temporary / "figures", "gates_by_class")
            save_figure(
                _spread(statistics, picked[:MAX_SPREAD] or [shown[0], shown[-1]]),
                temporary / "figures",
                "gates_spread",
            )
        atomic_write(temporary / "gates.csv", channel_csv(statistics))
        atomic_write(temporary / "gates_by_class.csv", class_csv(statistics))
        statistics.save(temporary / "statistics.safetensors")
        name = str(explanation.checkpoint.model.config["name"])
        data = explanation.data
        page = explain_page(
            statistics,
            f"Gates of {name} on {data.name}",
            f"{len(statistics.blocks)} SE blocks, {statistics.images:,} images, "
            f"{len(statistics.classes)} classes.",
            lambda position: _image(explanation, position),
            images=images,
            classes=picked,
        )
        atomic_write(temporary / "report.html", page)


def _image(explanation: Explanation, position: int) -> tuple[Image.Image, str]:
    picture, target = map_style(explanation.data.val, "senet explain")[position]
    return displayed(picture), explanation.truth(target)


def _evenly(statistics: GateStatistics, count: int = 4) -> list[int]:
    count_of = next(iter(statistics.blocks.values())).moments.count
    present = torch.nonzero(count_of)[:, 0].tolist()
    places = np.linspace(0, len(present) - 1, count).round().astype(int)
    return sorted({present[place] for place in places})


def _by_class(statistics: GateStatistics, shown: list[int]) -> Figure:
    """Figure 6 of the paper: the last block of each stage, all blocks of the last one."""
    stages = list(statistics.stages().values())
    names = [blocks[-1] for blocks in stages[:-1]] + stages[-1]
    rows = shown or torch.nonzero(statistics.blocks[names[0]].moments.count)[:, 0].tolist()
    gates = {name: statistics.blocks[name].class_mean[rows].numpy() for name in names}
    neutral = neutral_gate(statistics.blocks[names[-1]].gate)
    return gates_per_stage(gates, [statistics.classes[k] for k in rows], neutral=neutral)


def _spread(statistics: GateStatistics, shown: list[int]) -> Figure:
    """Figure 7 of the paper: the last block of each stage."""
    blocks = [statistics.blocks[names[-1]] for names in statistics.stages().values()]
    return gates_spread(
        {block.name: block.class_mean[shown].numpy() for block in blocks},
        {block.name: block.class_std[shown].numpy() for block in blocks},
        [statistics.classes[k] for k in shown],
    )


def channel_csv(statistics: GateStatistics) -> str:
    """A row a channel: mean, spread, quantiles, range, share between classes, saturation."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    quantiles = [f"q{round(100 * q):02d}" for q in QUANTILES]
    head = ("block", "channel", "images", "mean", "std", *quantiles, "min", "max")
    writer.writerow((*head, "between_classes", "near_low", "near_high", "folding_bound"))
    for block in statistics.blocks.values():
        columns = [
            block.mean,
            block.variance.sqrt(),
            *(block.quantile(q) for q in QUANTILES),
            block.smallest,
            block.largest,
            block.between_by_channel,
            block.low / block.count,
            block.high / block.count,
            block.folding_bound,
        ]
        for channel, values in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            writer.writerow((block.name, channel, block.count, *(f"{v:.6g}" for v in values)))
    return buffer.getvalue()


def class_csv(statistics: GateStatistics) -> str:
    """A row a block, class and channel: images, mean, spread, and quantiles if they were kept."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    quantiles = [f"q{round(100 * q):02d}" for q in QUANTILES]
    writer.writerow(("block", "class", "channel", "images", "mean", "std", *quantiles))
    for block in statistics.blocks.values():
        mean, std = block.class_mean, block.class_std
        kept = [block.class_quantile(q) for q in QUANTILES]
        for number, name in enumerate(statistics.classes):
            images = int(block.moments.count[number])
            columns = [mean[number].tolist(), std[number].tolist()]
            columns += [q[number].tolist() for q in kept if q is not None]
            for channel, values in enumerate(zip(*columns, strict=True)):
                texts = [f"{value:.6g}" for value in values]
                texts += [""] * (2 + len(QUANTILES) - len(texts))
                writer.writerow((block.name, name, channel, images, *texts))
    return buffer.getvalue()
