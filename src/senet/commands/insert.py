"""What `senet insert` does: a checkpoint with SE inserted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from senet.checkpoint.write import write_checkpoint
from senet.commands.network import open_network
from senet.insertion.insert import insert
from senet.insertion.report import InsertionReport
from senet.models.description import describe
from senet.support.places import check_new_folder


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
        UserError: a folder that exists or cannot be made, or as for `open_source`,
            `open_checkpoint` and `insert`; nothing is written.
    """
    check_new_folder(out, "checkpoint folder")
    checkpoint = open_network(model, weights, num_classes=num_classes, image_size=image_size)
    network, preprocessing = checkpoint.model, checkpoint.preprocessing
    side = preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, preprocessing.channels, side, side, generator=generator)
    report = insert(network.eval(), example_input=example, **options)
    config: Any = network.config
    classes = network.classes or ()
    plain = checkpoint.task.to_dict()
    description = describe(
        config, preprocessing.to_dict(), classes, task=plain, run=checkpoint.config
    )
    write_checkpoint(out, network.state_dict(), description)
    return Inserted(out, report)
