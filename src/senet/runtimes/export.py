"""`senet.export`: a network as a file for another runtime, verified before it is called done."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from senet.anatomy.example import attempt, own_size
from senet.errors import SenetError, UserError
from senet.inference.rounding import allowed, difference
from senet.runtimes.forms import FORMS, Form, in_form
from senet.runtimes.onnx import (
    add_metadata,
    dimensions,
    first_cause,
    quantize,
    quantized_convolutions,
    refusal,
    write_onnx,
)
from senet.runtimes.sessions import METADATA, SUFFIXES, Exported, Format, open_exported
from senet.support.copies import copied
from senet.support.extras import optional
from senet.support.places import check_file

OPSET = 20
# Difference from eager, relative to the largest logit, up to which nothing is asked. Beyond it
# rounding must explain the difference (`senet.inference.rounding`).
TOLERANCE = 1e-4
_ROUNDS = 7
_SECONDS = 8.0  # after that, three rounds are enough to choose by
Batch = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        path: the file.
        format: its format.
        form: the form of its graph, see `senet.runtimes.forms`.
        images: how many images the example has.
        milliseconds: by form, the median time of the example in the file's runtime, and with
            int8 that of "int8" beside its form in float32; empty where there was nothing to
            compare.
        difference: largest difference from eager over all checked inputs, relative to the largest
            logit.
        inputs: how many inputs were checked.
        quantized: convolutions in int8; 0 for a float32 file.
        accuracy: top-1 in percent by precision ("float32", "int8"); empty without labels.
        evaluated: how many images the accuracy is of.
    """

    path: Path
    format: Format
    form: Form
    images: int
    milliseconds: dict[str, float]
    difference: float
    inputs: int
    quantized: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    evaluated: int = 0


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    example_input: Tensor | None = None,
    batch: int | None = None,
    any_size: bool = False,
    form: Form | None = None,
    opset: int = OPSET,
    classes: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    calibration: Iterable[Batch] | None = None,
    evaluation: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> ExportReport:
    """Write a network for ONNX Runtime, OpenVINO or torch.export, and check the file.

    The file is run in its own runtime on the example and on random images and compared with the
    model in PyTorch; only then it gets its name. Class names and preprocessing are written into
    it (`open_exported` reads them).

    Args:
        model: the network, which returns one tensor; stays as it is.
        path: file to write: .onnx, .xml (OpenVINO, beside it a .bin) or .pt2 (torch.export).
        format: "onnx", "openvino" or "torch"; by the ending by default.
        example_input: images (N,C,H,W), float32; random ones of `model.input_size` by
            default, (C,H,W) or the side of square images.
        batch: a fixed number of images; None for any.
        any_size: whether height and width stay free; not every network allows that.
        form: "plain", "squeeze_first" or "expanded" (see `senet.runtimes.forms`); None takes the
            fastest on the example, measured in the file's runtime.
        opset: ONNX operator set.
        classes: names in the order of the outputs; the model's own by default.
        preprocessing: how an image becomes the input, in plain values: numbers, texts, lists and
            dicts; the model's own by default, where it has some.
        task: what the outputs are, as plain values (see `senet.tasks`); the model's own by default,
            which may be None: logits of classes.
        calibration: batches of images, or of (images, labels): quantizes the convolutions to int8
            (ONNX only). Gates stay in float32.
        evaluation: batches of (images, labels) that the accuracies in float32 and int8 are
            measured on; by default those of the calibration, where they have labels.

    Returns:
        What was written and how it was verified.

    Raises:
        UserError: an unknown format or form, a path that cannot be written, no example and no
            `input_size`, values that no file can hold, a missing package, or a network that returns
            no single tensor or cannot be copied or exported this way.
        SenetError: the runtime's results differ from PyTorch's by more than 1e-4 of the largest
            logit, and than ten times PyTorch's own distance from float64; no file is left.
    """
    path = Path(path)
    found = _checked_format(path, format)
    if form is not None and form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if batch is not None and batch < 1:
        raise UserError(f"batch must be at least 1 or None, got {batch}")
    if calibration is not None and found != "onnx":
        raise UserError(f"calibration (int8) needs format 'onnx', got {found!r}")
    if evaluation is not None and calibration is None:
        raise UserError("evaluation compares int8 with float32: give calibration too")
    check_file(path, "path")
    described = {
        "classes": _class_names(model, classes),
        "preprocessing": _described(model, "preprocessing", preprocessing),
        "task": _described(model, "task", task),
    }
    eager = copied(model).cpu().float().eval()
    example = _example(eager, example_input, batch)
    _check_output(eager, example)
    forms = _forms(
        form, fixed=batch is not None and not any_size, quantized=calibration is not None
    )
    metadata = {
        **described,
        "input_size": list(example.shape[1:]),
        "batch": batch,
        "config": _described(model, "config", None),
        "precision": "float32",
        "senet": importlib.metadata.version("senet"),
    }
    options = {"batch": batch, "any_size": any_size, "opset": opset}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written: dict[str, Path] = {}
        for name in forms:
            shaped = in_form(eager, example, name)
            if shaped is not None:
                written[name] = Path(folder) / f"{name}{SUFFIXES[found]}"
                _write(shaped, example, written[name], found, metadata | {"form": name}, options)
        if not written:
            raise UserError(f"the network has no SE block for form {form!r}; use 'squeeze_first'")
        timings = _timings(written, example) if len(written) > 1 else {}
        chosen: Any = min(timings, key=lambda key: timings[key]) if timings else next(iter(written))
        file = written[chosen]
        inputs = _inputs(example, batch, any_size)
        largest = _verify(open_exported(file), eager, inputs)
        quantized, evaluated = 0, 0
        accuracy: dict[str, float] = {}
        if calibration is not None:
            batches = [b if isinstance(b, Tensor) else tuple(b) for b in calibration]
            small = _quantized(file, batches, metadata | {"form": chosen, "precision": "int8"})
            quantized = quantized_convolutions(small)
            timings |= _timings({chosen: file, "int8": small}, example)
            if evaluation is None:
                evaluation = [(b[0], b[1]) for b in batches if not isinstance(b, Tensor)]
            accuracy, evaluated = _accuracies({"float32": file, "int8": small}, evaluation)
            file = small
        _publish(file, path)
    return ExportReport(
        path=path,
        format=found,
        form=chosen,
        images=len(example),
        milliseconds=timings,
        difference=largest,
        inputs=len(inputs),
        quantized=quantized,
        accuracy=accuracy,
        evaluated=evaluated,
    )


def _checked_format(path: Path, format: Format | None) -> Format:
    if format is not None and format not in get_args(Format):
        raise UserError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    for name in get_args(Format):
        if path.suffix == SUFFIXES[name] and format in (None, name):
            return name
    wanted = SUFFIXES[format] if format else " or ".join(SUFFIXES.values())
    raise UserError(f"the path must end in {wanted}, got {path.name}")


def _example(model: nn.Module, given: Tensor | None, batch: int | None) -> Tensor:
    if given is None:
        size = own_size(model)
        if size is None or len(size) != 3:
            said = getattr(model, "input_size", None)
            has = "no input_size" if said is None else f"input_size {said!r}, and not (C,H,W)"
            raise UserError(
                f"example_input is needed: {type(model).__name__} has {has}; pass images (N,C,H,W)"
            )
        generator = torch.Generator().manual_seed(0)
        # Two, and not one: torch.export takes a dimension of 1 for a constant.
        given = torch.randn(batch or 2, *size, generator=generator)
    if not isinstance(given, Tensor) or given.ndim != 4:
        raise UserError("example_input must be a tensor (N,C,H,W)")
    if batch is not None and len(given) != batch:
        given = given[:1].expand(batch, -1, -1, -1)
    elif batch is None and len(given) == 1:
        given = given.expand(2, -1, -1, -1)
    return given.detach().cpu().float().contiguous()


def _class_names(model: nn.Module, given: Sequence[str] | None) -> list[str] | None:
    """The names given, else the model's own, where these are some."""
    if given is None:
        own = getattr(model, "classes", None)
        return list(own) or None if isinstance(own, list | tuple) and _is_plain(own) else None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UserError(f"classes must be names in the order of the outputs, got {given!r}")
    names = list(given)
    if not _is_plain(names):
        raise UserError(f"classes must be names, texts each, got {names!r:.80}")
    return names or _class_names(model, None)


def _described(model: nn.Module, name: str, given: dict[str, Any] | None) -> Any:
    """What the file says under a name: what was given, else the model's own.

    Other libraries use the same names for objects and layers, of which no file can hold anything.
    """
    if given is not None and not _is_plain(given):
        raise UserError(
            f"{name} is written into the file as JSON and must be made of numbers, texts, lists "
            f"and dicts, got {_odd(given)}; turn tensors into lists by .tolist()"
        )
    own = getattr(model, name, None)
    return given or (own if _is_plain(own) else None)


def _is_plain(value: object) -> bool:
    """Whether a file can hold a value as JSON."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _odd(given: object) -> str:
    """What is not plain: the first such value of a dict, with its key."""
    for key, value in given.items() if isinstance(given, dict) else ():
        if not _is_plain({key: value}):
            return f"a {type(value).__name__} for {key!r}"
    return f"a {type(given).__name__}"


@torch.no_grad()
def _check_output(eager: nn.Module, example: Tensor) -> None:
    """Refuse a network that returns anything but one tensor."""
    output = attempt(lambda: eager(example), (example,))
    if isinstance(output, Tensor):
        return
    parts = f" of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    raise UserError(
        f"the network returns a {type(output).__name__}{parts}, and a file has one output: export "
        "a module that calls the network and returns one tensor of it"
    )


def _forms(form: Form | None, *, fixed: bool, quantized: bool) -> tuple[Form, ...]:
    if form == "expanded" and not fixed:
        raise UserError("form 'expanded' needs a fixed batch and size: give batch, not any_size")
    if form == "expanded" and quantized:
        raise UserError("form 'expanded' is not for int8: its gates would be quantized too")
    if form is not None:
        return (form,)
    return FORMS if fixed and not quantized else ("plain", "squeeze_first")


def _write(
    model: nn.Module,
    example: Tensor,
    path: Path,
    format: Format,
    metadata: dict[str, Any],
    options: dict[str, Any],
) -> None:
    if format == "onnx":
        write_onnx(model, example, path, **options)
        add_metadata(path, metadata)
        return
    dynamic = dimensions(options["batch"], options["any_size"])
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    except Exception as error:  # PyTorch has many kinds
        raise UserError(f"the network cannot be exported this way: {refusal(error)}") from error
    if format == "torch":
        torch.export.save(program, path, extra_files={f"{METADATA}.json": json.dumps(metadata)})
        return
    openvino = optional("openvino")
    try:
        converted = openvino.convert_model(program)
    except Exception as error:  # OpenVINO's kinds
        raise UserError(f"OpenVINO cannot convert the network: {first_cause(error)}") from error
    converted.set_rt_info(json.dumps(metadata), [METADATA])
    openvino.save_model(converted, str(path), compress_to_fp16=False)


def _timings(files: dict[str, Path], example: Tensor) -> dict[str, float]:
    """Median milliseconds of each file in its runtime, in turns.

    Each turn begins with a run that does not count: threads of the runtime before may still spin.
    """
    runs = {name: open_exported(path).run for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(example)
    start = time.perf_counter()
    for done in range(_ROUNDS):
        if done >= 3 and time.perf_counter() - start > _SECONDS:
            break
        for name, run in runs.items():
            run(example)
            began = time.perf_counter()
            run(example)
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def _inputs(example: Tensor, batch: int | None, any_size: bool) -> list[Tensor]:
    """The example, and random images of other batches and sizes where those are free."""
    generator = torch.Generator().manual_seed(1)
    _, C, H, W = example.shape
    shapes = [(len(example), C, H, W)]
    if batch is None:
        shapes += [(1, C, H, W), (3, C, H, W)]
    if any_size:
        shapes.append((len(example), C, H + 32, W + 64))
    return [example, *(torch.randn(shape, generator=generator) for shape in shapes)]


def _verify(exported: Exported, eager: nn.Module, inputs: Sequence[Tensor]) -> float:
    worst = 0.0
    for x in inputs:
        with torch.no_grad():
            wanted = eager(x)
        found = exported.run(x)
        if found.shape != wanted.shape:
            raise SenetError(
                f"the exported network gives {tuple(found.shape)} for {tuple(x.shape)}, "
                f"PyTorch gives {tuple(wanted.shape)}"
            )
        off = difference(found, wanted)
        if not off <= TOLERANCE and not off <= allowed(eager, x, wanted, TOLERANCE):
            raise SenetError(
                f"the exported network differs from PyTorch by {off:.1e} relative for an "
                f"input {tuple(x.shape)}; nothing was written"
            )
        worst = max(worst, off)
    return worst


def _quantized(file: Path, batches: Sequence[Batch], metadata: dict[str, Any]) -> Path:
    """The int8 version of a file, beside it."""
    images = [b if isinstance(b, Tensor) else b[0] for b in batches]
    if not images:
        raise UserError("calibration is empty: give some hundred images in batches")
    fixed = metadata["batch"]
    if fixed is not None:
        images = [part for batch in images for part in batch.split(fixed) if len(part) == fixed]
        if not images:
            raise UserError(f"calibration needs at least {fixed} images, as many as a batch")
    target = file.with_name("int8.onnx")
    quantize(file, target, images)
    add_metadata(target, metadata)
    if not bool(open_exported(target).run(images[0]).isfinite().all()):
        raise SenetError("the int8 network gives numbers that are not finite; nothing was written")
    return target


def _accuracies(
    files: dict[str, Path], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], int]:
    """Top-1 of each file in percent, and of how many images; nothing without batches."""
    opened = {name: open_exported(path) for name, path in files.items()}
    right = dict.fromkeys(opened, 0)
    count = 0
    for x, y in batches:
        for name, exported in opened.items():
            right[name] += int((_run_batch(exported, x).argmax(1) == y).sum())
        count += len(y)
    if not count:
        return {}, 0
    return {name: 100 * value / count for name, value in right.items()}, count


def _run_batch(exported: Exported, x: Tensor) -> Tensor:
    """Logits of any number of images, whatever batch the network has."""
    fixed = exported.metadata["batch"]
    if fixed is None:
        return exported.run(x)
    filled = torch.cat([x, x[-1:].expand(-len(x) % fixed, -1, -1, -1)])
    return torch.cat([exported.run(part) for part in filled.split(fixed)])[: len(x)]


def _publish(file: Path, path: Path) -> None:
    """Give a finished file its name, with the weights that lie beside it (OpenVINO)."""
    weights = file.with_suffix(".bin")
    if weights.exists():
        shutil.move(weights, path.with_suffix(".bin"))
    file.replace(path)
