"""`senet predict`: what is in images."""

import sys
from csv import writer as csv_writer
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from senet.cli.options import (
    Config,
    Decode,
    Device,
    OptionalWhole,
    Switch,
    Whole,
    is_place,
    prepare_process,
    trained_network,
)
from senet.cli.tables import print_table
from senet.errors import UserError
from senet.support.collector import importing
from senet.support.progress import watch
from senet.support.text import printable

if TYPE_CHECKING:
    from senet.commands.predict import Predicted, Prediction
    from senet.tasks.task import Answer

Images = Annotated[
    tuple[Path, ...],
    Parameter(name=("--images", "--data"), negative="", consume_multiple=True, show_default=False),
]


def predict(
    checkpoint: Path | None = None,
    /,
    images: Images = (),
    *,
    model: str | None = None,
    weights: Path | None = None,
    top: OptionalWhole = None,
    json: Switch = False,
    csv: Switch = False,
    device: Device = "auto",
    engine: Literal["eager", "optimized", "onnx", "openvino"] | None = None,
    batch_size: Whole = 32,
    decode: Decode = None,
    no_tune_allocator: Switch = False,
    config: Config = None,
) -> int:
    """Name the classes of images with the class names and preprocessing of a checkpoint.

    Of a checkpoint of several labels an image: those whose probability reaches the threshold that
    the checkpoint keeps for each; of one of numbers: the numbers.

    The next images are decoded while the network works; the images a second beneath the table are
    with reading and preparing. An image that cannot be read is named on standard error, the rest
    go on, and the exit code is 1 at the end.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, model.safetensors, folder
            of save_pretrained, hf_hub:owner/name; with --model, weights of any released layout, or
            the word pretrained for released ones (senet models --pretrained lists them); or
            what senet export wrote (.onnx, .xml, .pt2), which runs in its own runtime.
        images: image files, or folders that are searched for them.
        model: network that the weights are for, where they do not say it (.pth, timm's, …); its
            classes are numbers then, but for released weights of ImageNet. Or the checkpoint.
        weights: the same as the checkpoint; then, and where --model is the checkpoint, all that has
            no flag is images.
        top: how many classes to show for each image, most probable first (default: 5); not for
            labels and numbers, which are all told.
        json: print JSON instead of a table.
        csv: print CSV instead: image, rank, class, probability; of labels image, rank, label,
            probability, threshold, present, for all labels; of numbers image, rank, number, value.
        device: where the network runs.
        engine: eager (PyTorch, the default), optimized (senet.optimize: faster, a moment to
            prepare), onnx (ONNX Runtime) or openvino.
        batch_size: images at a time.
        decode: who decodes JPEG: pillow, or turbo (the libjpeg-turbo in torchvision); Pillow
            decodes all else (default: pillow).
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    if json and csv:
        raise UserError("give --json or --csv, not both")
    prepare_process(tune_allocator=not no_tune_allocator)
    with importing():
        from senet.commands.predict import predict as predict_classes

    if checkpoint is not None and (weights is not None or (model is not None and is_place(model))):
        images, checkpoint = (checkpoint, *images), None
    path, name = trained_network(checkpoint, model, weights)
    if not images:
        raise UserError(f"give images, or folders of them, such as: senet predict {path} photos/")
    with watch() as progress:
        found = predict_classes(
            path,
            images,
            model_name=name,
            top=top,
            device=device,
            engine=engine,
            batch_size=batch_size,
            decoder=decode or "pillow",
            progress=progress,
        )
    for error in found.broken:
        print(f"senet predict: {error}", file=sys.stderr)
    if json:
        print(dumps([_as_dict(prediction) for prediction in found.predictions], indent=1))
    elif csv:
        writer = csv_writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "rank", *found.task.answered))
        for each in found.predictions:
            for rank, answer in enumerate(each.answers, start=1):
                values = _printable(answer).values()
                writer.writerow((printable(str(each.image)), rank, *values))
    elif found.predictions:
        print_table(_table(found))
    if found.broken:
        images_read = len(found.predictions) + len(found.broken)
        print(
            f"senet predict: {len(found.broken)} of {images_read} images unreadable",
            file=sys.stderr,
        )
    return 1 if found.broken else 0


def _as_dict(prediction: "Prediction") -> dict[str, object]:
    return {
        "image": printable(str(prediction.image)),
        "predictions": [_printable(answer) for answer in prediction.answers],
    }


def _printable(answer: "Answer") -> dict[str, object]:
    return {k: printable(v) if isinstance(v, str) else v for k, v in answer.items()}


def _table(found: "Predicted") -> Table:
    """A line for each class, label or number of each image."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column(found.task.part)
    table.add_column("value" if found.task.name == "regression" else "%", justify="right")
    for prediction in found.predictions:
        name = str(prediction.image)
        lines = found.task.shown(prediction.answers)
        for rank, (label, value) in enumerate(lines, start=1):
            table.add_row(name if rank == 1 else "", label, value, end_section=rank == len(lines))
    rate = len(found.predictions) / found.seconds
    table.caption = f"{found.engine}: {rate:.4g} images/s"
    return table
