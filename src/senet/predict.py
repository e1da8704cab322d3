"""The classes of images from files, by a checkpoint."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from .data import BadImageError, load_image
from .errors import UserError
from .training.checkpoint import Checkpoint, open_checkpoint, open_weights
from .training.loop import choose_device
from .units import print_table

BATCH_SIZE = 32


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        image: its file.
        classes: class names, most probable first.
        probabilities: softmax probabilities of `classes`, in (0, 1).
    """

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files: those named, and all below the folders named, sorted within each folder.

    A named file is kept whatever it is called; in folders only names count that end as one of
    Pillow's formats does.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    endings = Image.registered_extensions()
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in endings and file.is_file()
            )
            if not inside:
                raise UserError(f"no images in folder {path}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"no such image or folder: {path}")
    return found


def predict_images(
    checkpoint: Checkpoint, images: Sequence[Path], *, top: int, device: torch.device
) -> Iterator[Prediction | BadImageError]:
    """The classes of each image, in order; the error in place of one that cannot be read.

    Args:
        checkpoint: network, class names and preprocessing.
        images: image files.
        top: classes to give, at most as many as there are.
        device: where the network runs.
    """
    model = checkpoint.model.to(device).eval()
    preprocessing = checkpoint.preprocessing
    transform = preprocessing.transform()
    for start in range(0, len(images), BATCH_SIZE):
        part = images[start : start + BATCH_SIZE]
        read: list[Tensor | BadImageError] = []
        for path in part:
            try:
                read.append(transform(load_image(path, preprocessing.channels)))
            except BadImageError as error:
                read.append(error)
        good = [image for image in read if isinstance(image, Tensor)]
        with torch.inference_mode():
            logits = model(torch.stack(good).to(device)) if good else torch.empty(0)
        ranked = iter(logits.float().softmax(-1).cpu() if good else ())
        for path, image in zip(part, read, strict=True):
            if isinstance(image, BadImageError):
                yield image
                continue
            values, indices = next(ranked).topk(min(top, len(checkpoint.classes)))
            yield Prediction(
                path,
                tuple(checkpoint.classes[index] for index in indices.tolist()),
                tuple(values.tolist()),
            )


def print_predictions(
    checkpoint_path: Path,
    paths: Sequence[Path],
    *,
    model_name: str | None = None,
    top: int,
    as_json: bool,
    device: str,
) -> int:
    """Print the predictions as a table or as JSON and name broken images on standard error.

    Args:
        checkpoint_path: as for `open_checkpoint`; with `model_name`, as for `open_weights`.
        paths: image files, or folders that are searched for them.
        model_name: name of the network, for weights that do not say it.
        top: classes to give of each image.
        as_json: print JSON.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        0, or 1 if an image could not be read.

    Raises:
        UserError: `top` < 1, a missing path, an empty folder, or no such checkpoint.
    """
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    images = find_images(paths)
    if model_name is None:
        checkpoint = open_checkpoint(checkpoint_path)
    else:
        checkpoint = open_weights(model_name, checkpoint_path)
    predictions: list[Prediction] = []
    broken = 0
    for result in predict_images(checkpoint, images, top=top, device=choose_device(device)):
        if isinstance(result, Prediction):
            predictions.append(result)
        else:
            broken += 1
            print(f"senet predict: {result}", file=sys.stderr)
    if as_json:
        print(json.dumps([_as_dict(prediction) for prediction in predictions], indent=1))
    elif predictions:
        print_table(_table(predictions))
    if broken:
        print(f"senet predict: {broken} of {len(images)} images unreadable", file=sys.stderr)
    return 1 if broken else 0


def _as_dict(prediction: Prediction) -> dict[str, object]:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return {
        "image": str(prediction.image),
        "predictions": [{"class": name, "probability": value} for name, value in pairs],
    }


def _table(predictions: Sequence[Prediction]) -> Table:
    """A line for each class of each image."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class")
    table.add_column("%", justify="right")
    for prediction in predictions:
        name = str(prediction.image)
        last = len(prediction.classes) - 1
        for rank, (label, value) in enumerate(
            zip(prediction.classes, prediction.probabilities, strict=True)
        ):
            table.add_row(
                name if rank == 0 else "", label, f"{100 * value:.1f}", end_section=rank == last
            )
    return table
