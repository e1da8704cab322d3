"""`senet optimize`: any network made ready for inference, with a report, and as a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from senet.checkpoint.files import open_checkpoint
from senet.commands.export import in_own_units
from senet.commands.network import open_network
from senet.errors import UserError
from senet.inference import OptimizationReport, optimize
from senet.runtimes.export import ExportReport, export


@dataclass(frozen=True)
class Optimized:
    """What was optimized.

    Attributes:
        name: the network's name.
        shape: shape of the example.
        report: what was done, and what it gained.
        written: the file that was written; None for none.
    """

    name: str
    shape: tuple[int, ...]
    report: OptimizationReport
    written: ExportReport | None


def optimize_network(
    model: str,
    *,
    weights: Path | None = None,
    batch_size: int = 1,
    image_size: int | None = None,
    measure: bool = True,
    out: Path | None = None,
) -> Optimized:
    """Optimize a network for inference on the CPU, and write it as a file of torch.export.

    Args:
        model: a run folder or checkpoint, or a name for `senet.networks.anywhere.open_source`.
        weights: weights for a name, as for `open_network`; None: fresh ones.
        batch_size: images of the example that is timed.
        image_size: side of the images; by default the checkpoint's or the network's own.
        measure: whether to time it, and to keep the original where that is faster.
        out: file to write, which ends in .pt2; it takes any number of images.

    Raises:
        UserError: no such network, sizes below 1, a file of another ending, or a network that
            torch.export cannot hold.
        SenetError: as for `senet.optimize` and `senet.export`.
    """
    for flag, value in (("--batch-size", batch_size), ("--image-size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    if out is not None and out.suffix != ".pt2":
        raise UserError(f"--out must end in .pt2 (torch.export), got {out.name}")
    if Path(model).exists():
        if weights is not None:
            raise UserError(f"{model} has its own weights: leave out --weights")
        checkpoint = open_checkpoint(Path(model))
    else:
        checkpoint = open_network(model, weights)
    preprocessing = checkpoint.preprocessing
    if image_size is not None:
        preprocessing = preprocessing.resized(image_size)
    side = preprocessing.image_size
    shape = (batch_size, preprocessing.channels, side, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    network, task = in_own_units(checkpoint)
    optimized = optimize(network, x, measure=measure)
    written = None
    if out is not None:
        written = export(
            optimized,
            out,
            example_input=x,
            form="plain",
            classes=checkpoint.classes,
            preprocessing=preprocessing.to_dict(),
            task=task.to_dict(),
        )
    return Optimized(model, shape, optimized.report, written)
