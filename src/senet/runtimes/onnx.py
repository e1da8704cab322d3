"""ONNX files: written by torch.onnx, quantized by ONNX Runtime's own tool."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import UserError
from senet.runtimes.sessions import METADATA
from senet.support.extras import optional

INPUT, OUTPUT = "images", "logits"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and deprecation notes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def dimensions(batch: int | None, any_size: bool) -> tuple[dict[int, Any]] | None:
    """What torch.export is told about the input's shape; None where all is fixed."""
    named: dict[int, Any] = {}
    if batch is None:
        named[0] = torch.export.Dim("batch", min=1)
    if any_size:
        # Not named ones: strides leave guards on a size that only these may have.
        named |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return (named,) if named else None


def first_cause(error: BaseException) -> str:
    """The first line of the error that a chain of errors began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refusal(error: BaseException, remedy: str = "") -> str:
    """Why a network cannot be exported, and what to do.

    Args:
        error: what PyTorch's exporter raised.
        remedy: what to do unless the network is at fault.
    """
    # Here, as it brings SymPy, which the exporter has loaded by now.
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GuardOnDataDependentSymNode):
        cause = cause.__cause__
    if cause is not None:
        remedy = (
            "the network computes with numbers taken out of tensors (a branch on them, .item(), "
            "float()): keep them tensors, and choose by torch.where"
        )
    return "; ".join(filter(None, (first_cause(error), remedy)))


def write_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    batch: int | None,
    any_size: bool,
    opset: int,
) -> None:
    """Write a model as an ONNX file with all weights in it.

    Raises:
        UserError: the model cannot be exported with these dimensions or this opset, or onnx is
            missing.
    """
    optional("onnx")
    optional("onnxscript")
    dynamic = dimensions(batch, any_size)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                dynamic_shapes=dynamic,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.UserError) as error:
        raise UserError(
            f"the network cannot be exported to ONNX with batch={batch or 'any'}, "
            f"any_size={any_size}: {refusal(error, 'fix the batch or the size')}"
        ) from error
    # The exporter keeps its own version where it cannot convert to the one asked for.
    onnx = optional("onnx")
    imported = onnx.load(str(path), load_external_data=False).opset_import
    written = next(each.version for each in imported if each.domain == "")
    if written != opset:
        raise UserError(f"opset {opset} is not possible for this network, {written} is")


def add_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Write metadata into an ONNX file."""
    onnx = optional("onnx")
    model = onnx.load(str(path))
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA, value=json.dumps(metadata))
    model.producer_name = "senet"
    onnx.save(model, str(path))


class _Batches:
    """What ONNX Runtime's calibration reads: batches one after the other."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.contiguous().numpy()}


def quantize(source: Path, target: Path, batches: Iterable[Tensor]) -> None:
    """Static int8 quantization of the convolutions; everything else stays in float.

    Convolutions of vectors (maps of one pixel), as which many networks write the layers of their SE
    blocks, are left in float32 too: quantized gates cost accuracy out of proportion, and there is
    no time in them.

    Args:
        source: ONNX file in float32.
        target: file to write.
        batches: images (N,C,H,W), preprocessed; some hundred of them.
    """
    optional("onnxruntime")
    quantization = optional("onnxruntime.quantization")
    shape_inference = optional("onnxruntime.quantization.shape_inference")
    prepared = target.with_suffix(".prepared.onnx")
    try:
        with _quiet():
            shape_inference.quant_pre_process(str(source), str(prepared))
            quantization.quantize_static(
                str(prepared),
                str(target),
                _Batches(batches),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=_of_vectors(prepared),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"ForceQuantizeNoInputCheck": False},
            )
    finally:
        prepared.unlink(missing_ok=True)


def _of_vectors(path: Path) -> list[str]:
    """Convolutions of an ONNX file, whose shapes are inferred, that read maps of one pixel."""
    graph = optional("onnx").load(str(path)).graph
    pixels = {
        info.name: [size.dim_value for size in info.type.tensor_type.shape.dim[2:]]
        for info in (*graph.value_info, *graph.input)
    }
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    return [node.name for node in convolutions if pixels.get(node.input[0]) == [1, 1]]


def quantized_convolutions(path: Path) -> int:
    """How many convolutions of an ONNX file have int8 weights."""
    onnx = optional("onnx")
    graph = onnx.load(str(path)).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.op_type == "Conv" and node.input[1] in dequantized for node in graph.node)
