"""`senet export`: a checkpoint as a file for another runtime, checked on real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senet.checkpoint.files import Checkpoint
from senet.commands.evaluate import check_classes, open_data
from senet.commands.predict import find_images
from senet.data import (
    FileImages,
    ImageData,
    ImageSource,
    Preprocessing,
    check_decoder,
    map_style,
    val_loader,
)
from senet.data.arrays import is_picture
from senet.data.images import MemoryImages
from senet.data.sources.embedded import read_embedded
from senet.errors import UserError
from senet.networks.anywhere import head_of
from senet.runtimes.export import OPSET, ExportReport, export
from senet.runtimes.forms import Form
from senet.runtimes.sessions import Format
from senet.support.copies import copied
from senet.tasks.kinds import AnyTask
from senet.tasks.regression import Regression

CALIBRATION_IMAGES = 256
_BATCH = 32


Batches = Iterable[tuple[Tensor, Tensor]]


def export_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    format: Format | None = None,
    batch: int | None = None,
    any_size: bool = False,
    form: Form | None = None,
    opset: int = OPSET,
    int8: bool = False,
    data_name: str | None = None,
    data_options: Mapping[str, Any],
    calibration_images: int = CALIBRATION_IMAGES,
) -> ExportReport:
    """Export a checkpoint with its class names and preprocessing.

    The file is compared with PyTorch on real images (the validation images of `data_name`, or
    pictures of the embedded data set) and on random ones.

    Args:
        checkpoint: network, class names and preprocessing.
        path, format, batch, any_size, form, opset: as for `senet.export`.
        int8: quantize the convolutions, calibrated on training images; the accuracy before and
            after is measured on the validation images of classes.
        data_name: data set or folder as for `load_data`, or a folder of images without labels,
            which give no accuracy; for int8 that of the training by default.
        data_options: data_root and further fields of `RunConfig` that say how data are read.
            `image_size` is the side of the network's input as well.
        calibration_images: how many images int8 is calibrated on.

    Raises:
        UserError: as for `senet.export` and `load_data`; data of other classes; no data for int8.
        SenetError: the file's results differ from PyTorch's.
    """
    if calibration_images < 1:
        raise UserError(f"--calibration-images must be at least 1, got {calibration_images}")
    preprocessing = checkpoint.preprocessing
    side = data_options.get("image_size")
    if side is not None:
        least = checkpoint.model.min_input_size
        if side < least:
            raise UserError(f"--image-size must be at least {least} for this network, got {side}")
        preprocessing = preprocessing.resized(side)
    pictures: ImageSource = _embedded(preprocessing)
    calibration: list[Tensor] | None = None
    evaluation: Batches | None = None
    if int8 or data_name is not None:
        train, val = _open_images(checkpoint, data_name, data_options)
        pictures = train if val is None else map_style(val.val, "senet export")
        if int8:
            chosen = _sample(train, calibration_images)
            calibration = [images for images, _ in _batches(chosen, preprocessing)]
            if val is not None and val.task == "classification":
                evaluation = _batches(pictures, preprocessing)
    few = _sample(pictures, batch or 2)
    network, task = in_own_units(checkpoint)
    return export(
        network,
        path,
        format=format,
        example_input=next(iter(_batches(few, preprocessing)))[0],
        batch=batch,
        any_size=any_size,
        form=form,
        opset=opset,
        classes=checkpoint.model.classes,
        preprocessing=preprocessing.to_dict(),
        task=task.to_dict(),
        calibration=calibration,
        evaluation=evaluation,
    )


def in_own_units(checkpoint: Checkpoint) -> tuple[nn.Module, AnyTask]:
    """The network to export, and what its outputs are: numbers in their own units.

    Mean and deviation go into the last layer, so that users of the file need not know them.
    """
    model: nn.Module = checkpoint.model
    task = checkpoint.task
    if not isinstance(task, Regression):
        return model, task
    model = copied(model)
    try:
        head = head_of(model)[1]
    except UserError:  # the file's metadata say mean and deviation then
        return checkpoint.model, task
    bias: torch.Tensor | None = head.bias
    with torch.no_grad():
        mean, std = head.weight.new_tensor(task.mean), head.weight.new_tensor(task.std)
        head.weight.mul_(std[:, None])
        head.bias = nn.Parameter(mean if bias is None else bias * std + mean)
    count = len(task.names)
    return model, dataclasses.replace(task, mean=(0.0,) * count, std=(1.0,) * count)


def _embedded(preprocessing: Preprocessing) -> ImageSource:
    """Pictures of the embedded data set; for images of another kind each channel is one of them."""
    pictures = read_embedded()[1]
    channels, depth = preprocessing.channels, preprocessing.depth
    if is_picture(channels, depth):
        return pictures
    places = torch.arange(CALIBRATION_IMAGES)[:, None] + torch.arange(channels)
    images = pictures.images[places % len(pictures), 0]
    if depth == "16":
        images = (images.to(torch.int32) * 257).to(torch.uint16)
    elif depth == "float":  # about as the training's
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std)
        )
        images = mean + std * (images.float() / 128 - 1)
    return MemoryImages(images, torch.zeros(len(images), dtype=torch.int64))


def _open_images(
    checkpoint: Checkpoint, data_name: str | None, data_options: Mapping[str, Any]
) -> tuple[ImageSource, ImageData | None]:
    """Images to calibrate on, and data with labels, or None for a folder of mere images."""
    if data_name is not None and (folder := Path(data_name)).is_dir():
        inner = [entry for entry in folder.iterdir() if entry.is_dir()]
        if not inner:
            paths = [str(path) for path in find_images([folder])]
            labels = torch.zeros(len(paths), dtype=torch.int64)
            decoder = check_decoder(data_options.get("decode", "pillow"))
            images = checkpoint.preprocessing
            return FileImages(paths, labels, images.channels, decoder, images.depth), None
    data = open_data(checkpoint, data_name, data_options, whole=False)
    check_classes(checkpoint, data)
    return map_style(data.train, "senet export"), data


def _sample(source: ImageSource, count: int) -> ImageSource:
    """That many images, spread at random over the source; all of them where there are fewer."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    return source.subset(order[:count].tolist())


def _batches(source: ImageSource, preprocessing: Preprocessing) -> Batches:
    """Prepared images (N,C,H,W) and labels (N,)."""
    data = ImageData("images", source, source, (), preprocessing)
    return val_loader(data, batch_size=_BATCH, num_workers=0)
