"""`senet export`: a trained network as a file for others."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from senet.cli.options import (
    NO_DATA,
    DataFlags,
    OptionalWhole,
    Switch,
    given,
    given_network,
    named,
    prepare_process,
)
from senet.cli.tables import new_table, print_table
from senet.errors import UserError
from senet.support.places import check_file

if TYPE_CHECKING:
    from senet.checkpoint.files import Checkpoint
    from senet.runtimes.export import ExportReport
    from senet.runtimes.sessions import Format

# Those of `senet.runtimes.sessions.SUFFIXES`, which needs PyTorch.
ENDINGS = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}


def export(
    checkpoint: Path | None = None,
    /,
    out: Path | None = None,
    *,
    format: Literal["onnx", "openvino", "torch", "timm"] | None = None,
    model: str | None = None,
    weights: Path | None = None,
    batch: OptionalWhole = None,
    any_size: Switch = False,
    form: Literal["plain", "squeeze_first", "expanded"] | None = None,
    opset: OptionalWhole = None,
    int8: Switch = False,
    data: str | None = None,
    calibration_images: OptionalWhole = None,
    data_flags: DataFlags = NO_DATA,
    no_tune_allocator: Switch = False,
) -> None:
    """Write a trained network as a file for others; with --model and one path, any network.

    Files for ONNX Runtime, OpenVINO and torch.export hold class names and preprocessing; each is
    run in its own runtime and compared with PyTorch before it gets its name. Of the forms that the
    SE blocks can have there, the fastest here is taken. `senet predict` runs such a file.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, model.safetensors, folder
            of save_pretrained, hf_hub:owner/name; with --model, weights of any released layout,
            the word pretrained for released ones (senet models --pretrained lists them), or left
            out: then its weights are fresh.
        out: file to write: .onnx, .xml (OpenVINO, with a .bin beside it), .pt2 (torch.export);
            .safetensors or .pth for timm.
        format: by the ending; timm: weights that timm loads with strict=True.
        model: network that the weights are for, where they do not say it (.pth, timm's, …); also
            torchvision:NAME, timm:NAME or FILE.py:FUNCTION; or the checkpoint.
        weights: the same as the checkpoint.
        batch: a fixed number of images; more forms are possible then (default: any number).
        any_size: leave height and width free; not every network allows it.
        form: how the SE blocks are laid out (default: the fastest, measured).
        opset: ONNX operator set (default: 20).
        int8: quantize the convolutions (ONNX), calibrated on training images; shows the accuracy
            on the validation images before and after.
        data: data set or folder for int8 and for the comparison with PyTorch, or a folder of images
            without labels (default: what the checkpoint was trained on).
        calibration_images: images that int8 is calibrated on (default: 256).
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    if out is None:
        checkpoint, out = None, checkpoint
    if out is None or (checkpoint is None and weights is None and model is None):
        alone = "" if out is None else f"; got {out} alone"
        raise UserError(f"give a checkpoint and a file to write, or --model{alone}")
    path, name = given_network(checkpoint, model, weights)
    chosen = format or ENDINGS.get(out.suffix)
    if chosen is None:
        raise UserError(f"{out.name} does not tell the format: give --format timm, or {_endings()}")
    options = named(batch=batch, form=form, opset=opset)
    options |= {key: True for key, value in (("any_size", any_size), ("int8", int8)) if value}
    options |= named(data=data, calibration_images=calibration_images) | given(data_flags)
    _check(chosen, options)
    check_file(out, "path")
    prepare_process(tune_allocator=not no_tune_allocator)
    opened = _opened(name, path)
    if chosen == "timm":
        _write_timm(opened, out)
    else:
        _write_runtime(opened, out, cast("Format", chosen), options, data_flags)


def _opened(model: str | None, weights: Path | None) -> "Checkpoint":
    """A checkpoint, or a network by name with weights of it."""
    from senet.checkpoint.files import open_checkpoint, open_weights
    from senet.commands.network import open_network
    from senet.models import list_models
    from senet.weights.released import is_pretrained

    if model is None:
        assert weights is not None
        return open_checkpoint(weights)
    if weights is not None and (is_pretrained(weights) or model in list_models()):
        return open_weights(model, weights)
    return open_network(model, weights)


def _endings() -> str:
    return "a path that ends in " + " or ".join(ENDINGS)


def _check(format: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the format, or float32, has no use for."""
    flags = {name: f"--{name.replace('_', '-')}" for name in options}
    if format == "timm" and flags:
        raise UserError(f"--format timm takes no {' or '.join(flags.values())}")
    if format != "onnx":
        for name in ("opset", "int8"):
            if name in options:
                raise UserError(f"{flags[name]} is an option of ONNX, not of {format}")
    if "calibration_images" in options and "int8" not in options:
        raise UserError("--calibration-images is an option of --int8")
    for name in ("data_root", "download", "val_fraction", "skip_bad_images", "decode"):
        if name in options and not {"int8", "data"} & options.keys():
            raise UserError(f"{flags[name]} says how data are read: give --data or --int8")


def _write_timm(checkpoint: "Checkpoint", path: Path) -> None:
    from senet.weights import save_weights, timm_name

    network = checkpoint.model
    save_weights(network, path, layout="timm")
    config = network.config
    print(
        f"{path}: timm.create_model({timm_name(network)!r}, num_classes={config['num_classes']}, "
        f"in_chans={config['in_channels']}) loads it with strict=True"
    )


def _write_runtime(
    checkpoint: "Checkpoint",
    path: Path,
    format: "Format",
    options: Mapping[str, Any],
    data_flags: DataFlags,
) -> None:
    from senet.commands.export import export_checkpoint

    own = ("batch", "any_size", "form", "opset", "int8", "calibration_images")
    report = export_checkpoint(
        checkpoint,
        path,
        format=format,
        data_name=options.get("data"),
        data_options=given(data_flags),
        **{name: options[name] for name in own if name in options},
    )
    _print_report(report)


def _print_report(report: "ExportReport") -> None:
    """What was written, what was measured and how far it is from PyTorch."""
    kind = "int8" if report.quantized else report.form
    accuracy = (f"top-1 of {report.evaluated:,} (%)",) if report.accuracy else ()
    table = new_table("graph", right=(f"ms for {report.images}", *accuracy))
    for name, time in report.milliseconds.items():
        row = [f"{name}, written" if name == kind else name, f"{time:.4g}"]
        if report.accuracy:
            precision = {"int8": "int8", report.form: "float32"}.get(name)
            row.append(f"{report.accuracy[precision]:.2f}" if precision else "")
        table.add_row(*row)
    if report.milliseconds:
        print_table(table)
    print(
        f"{report.path}: {report.form}; at most {report.difference:.1e} of the largest logit from "
        f"PyTorch on {report.inputs} batches, real and random"
    )
    if report.quantized:
        print(f"int8: {report.quantized} convolutions; the gates stay in float32")
