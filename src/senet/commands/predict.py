"""What is in images from files, by a checkpoint or an exported network."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from senet.checkpoint.files import open_checkpoint, open_weights
from senet.data import (
    BadImageError,
    Decoder,
    Preprocessing,
    check_decoder,
    image_files,
    load_image,
)
from senet.data.arrays import check_turbo
from senet.errors import UserError
from senet.inference import optimize
from senet.runtimes.export import export
from senet.runtimes.sessions import SUFFIXES, Run, open_exported
from senet.support.ahead import load_ahead
from senet.support.device import choose_device
from senet.support.progress import Progress, Silent
from senet.tasks.kinds import AnyTask, from_dict
from senet.tasks.task import Answer

BATCH_SIZE = 32
Engine = Literal["eager", "optimized", "onnx", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True)
class Predictor:
    """A network in an engine, and what its outputs are.

    Attributes:
        run: outputs (N,K) of images (N,C,H,W), float32 on the CPU.
        task: what they are.
        preprocessing: how an image becomes its input.
        engine: how the network runs, as users are told.
        batch: the only number of images that it takes; None for any.
    """

    run: Run
    task: AnyTask
    preprocessing: Preprocessing
    engine: str
    batch: int | None = None


@dataclass(frozen=True)
class Prediction:
    """What is in an image.

    Attributes:
        image: its file.
        answers: plain values, with the keys that the task names: the most probable classes with
            their probabilities, all labels with probability, threshold and whether it is present,
            or numbers.
    """

    image: Path
    answers: tuple[Answer, ...]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files: those named, and all below the folders named, sorted within each folder.

    A named file is kept whatever it is called; in folders only names count that end as one of
    `senet.data.images.FORMATS` does.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(map(Path, image_files(path)))
            if not inside:
                raise UserError(f"no images in folder {path}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"no such image or folder: {path}")
    return found


def make_engine(
    name: Engine, model: nn.Module, example: Tensor, device: torch.device | None = None
) -> Run:
    """A function from images (N,C,H,W), float32 on the CPU, to logits (N,K) on the CPU.

    Args:
        name: "eager" (the model as it is), "optimized" (`senet.optimize`), "onnx" (ONNX Runtime)
            or "openvino"; the last two export the model into a temporary folder first and check
            the file.
        model: the network.
        example: images of the size that will come.
        device: where "eager" and "optimized" run; the CPU by default, where the other two run.

    Raises:
        UserError: unknown name, a missing runtime, or a device that the engine does not have.
    """
    device = device or torch.device("cpu")
    if name not in ENGINES:
        raise UserError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name in ("onnx", "openvino"):
        if device.type != "cpu":
            raise UserError(f"engine {name!r} runs on the CPU; use --device cpu, not {device}")
        suffix = ".onnx" if name == "onnx" else ".xml"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{suffix}"
            export(model, path, example_input=example)
            return open_exported(path).run
    network = model.eval() if name == "eager" else optimize(model, example, measure=False)
    network = network.to(device)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(x.to(device, memory_format=torch.channels_last)).float().cpu()

    return run


def open_predictor(
    path: Path, *, model_name: str | None, engine: Engine | None, device: str, batch_size: int
) -> Predictor:
    """A checkpoint in an engine, or an exported network in its runtime.

    Args:
        path: as for `open_checkpoint`; with `model_name`, as for `open_weights`; or a file of
            `senet export` (.onnx, .xml, .pt2).
        model_name: name of the network, for weights that do not say it.
        engine: one of `ENGINES`; "eager" by default, an exported file has
            its own.
        device: "auto", "cpu", "cuda" or "mps"; "auto" is the CPU for engines that run nowhere else.
        batch_size: images that will come at a time.

    Raises:
        UserError: no such checkpoint, an option that an exported file leaves no choice of, or one
            that does not say its classes and preprocessing.
    """
    if path.suffix in SUFFIXES.values():
        return _open_exported(path, model_name, engine, device, batch_size)
    checkpoint = open_checkpoint(path) if model_name is None else open_weights(model_name, path)
    engine = engine or "eager"
    cpu_only = engine in ("onnx", "openvino")
    where = torch.device("cpu") if cpu_only and device == "auto" else choose_device(device)
    size = checkpoint.preprocessing.image_size
    example = torch.zeros(batch_size, checkpoint.preprocessing.channels, size, size)
    run = make_engine(engine, checkpoint.model, example, where)
    return Predictor(run, checkpoint.task, checkpoint.preprocessing, engine)


def _open_exported(
    path: Path, model_name: str | None, engine: str | None, device: str, batch_size: int
) -> Predictor:
    given = {"--model": model_name, "--engine": engine}
    if device != "auto":
        given["--device"] = device
    for flag, value in given.items():
        if value is not None and (flag, value) != ("--device", "cpu"):
            raise UserError(f"{path} runs in its own runtime on the CPU: leave out {flag} {value}")
    exported = open_exported(path)
    about = exported.metadata
    if not about.get("preprocessing"):
        raise UserError(
            f"{path} does not say how an image becomes its input: write it with senet export"
        )
    preprocessing = Preprocessing.from_dict(about["preprocessing"])
    size = preprocessing.image_size
    batch = about["batch"]
    example = torch.zeros(batch or batch_size, preprocessing.channels, size, size)
    count = exported.run(example).shape[1]
    classes = tuple(about["classes"] or map(str, range(count)))
    task = from_dict(about.get("task"), classes)
    return Predictor(exported.run, task, preprocessing, path.name, batch)


def predict_images(
    predictor: Predictor,
    images: Sequence[Path],
    *,
    top: int | None,
    batch_size: int = BATCH_SIZE,
    decoder: Decoder = "pillow",
    progress: Progress | None = None,
) -> Iterator[Prediction | BadImageError]:
    """What is in each image, in order; the error in place of one that cannot be read.

    The next images are decoded while the network works.

    Args:
        predictor: network, task and preprocessing.
        images: image files.
        top: of classes, how many to give, at most as many as there are.
        batch_size: images at a time; a predictor's fixed `batch` goes first.
        decoder: as for `load_image`.
        progress: hears of each batch.
    """
    progress = progress or Silent()
    batch_size, task = predictor.batch or batch_size, predictor.task
    preprocessing = predictor.preprocessing
    pixels = preprocessing.pixels()

    def read(path: Path) -> Tensor | BadImageError:
        try:
            return pixels(load_image(path, preprocessing.channels, decoder, preprocessing.depth))
        except BadImageError as error:
            return error

    progress.begin_evaluation(-(-len(images) // batch_size))
    paths = iter(images)
    for part in load_ahead(images, read, batch_size):
        good = [image for image in part if isinstance(image, Tensor)]
        found: Iterator[Tensor] = iter(())
        if good:
            # A network of a fixed batch gets its last images again; nobody reads those outputs.
            filled = good + good[-1:] * ((predictor.batch or len(good)) - len(good))
            outputs = predictor.run(preprocessing.finish_batch(torch.stack(filled).numpy()))
            found = iter(task.read(outputs)[: len(good)])
        for image in part:
            path = next(paths)
            if isinstance(image, BadImageError):
                yield image
                continue
            yield Prediction(path, tuple(task.answers(next(found), top)))
        progress.evaluated(len(part))


@dataclass(frozen=True)
class Predicted:
    """What `predict` found.

    Attributes:
        task: what the answers are.
        predictions: of the images that could be read, in order.
        broken: why the others could not be.
        engine: how the network ran.
        seconds: time of reading, preparing and classifying all of them.
    """

    task: AnyTask
    predictions: tuple[Prediction, ...]
    broken: tuple[BadImageError, ...]
    engine: str
    seconds: float


def predict(
    checkpoint_path: Path,
    paths: Sequence[Path],
    *,
    model_name: str | None = None,
    top: int | None = None,
    device: str,
    engine: Engine | None = None,
    batch_size: int = BATCH_SIZE,
    decoder: Decoder = "pillow",
    progress: Progress | None = None,
) -> Predicted:
    """What is in all images; those that cannot be read are set aside.

    Args:
        checkpoint_path: as for `open_predictor`.
        paths: image files, or folders that are searched for them.
        model_name, device, engine: as for `open_predictor`.
        top: of classes, how many to give of each image; None: 5.
        batch_size: images at a time.
        decoder: as for `load_image`.
        progress: hears of each batch.

    Raises:
        UserError: `top` or `batch_size` < 1, `top` where there are no classes, a missing path, an
            empty folder, or as for `open_predictor`.
    """
    for flag, value in (("--top", top), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    check_decoder(decoder)
    images = find_images(paths)
    batch_size = min(batch_size, len(images))
    predictor = open_predictor(
        checkpoint_path, model_name=model_name, engine=engine, device=device, batch_size=batch_size
    )
    if top is not None and predictor.task.name != "classification":
        raise UserError(
            f"--top is for classes, {checkpoint_path} is for {predictor.task.name}: leave it out"
        )
    images_as = predictor.preprocessing
    check_turbo(decoder, "a network for images", images_as.channels, images_as.depth)
    predictions: list[Prediction] = []
    broken: list[BadImageError] = []
    began = time.perf_counter()
    for result in predict_images(
        predictor, images, top=top, batch_size=batch_size, decoder=decoder, progress=progress
    ):
        if isinstance(result, Prediction):
            predictions.append(result)
        else:
            broken.append(result)
    seconds = time.perf_counter() - began
    return Predicted(predictor.task, tuple(predictions), tuple(broken), predictor.engine, seconds)
