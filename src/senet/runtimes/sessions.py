"""Exported files and the runtimes that run them: ONNX Runtime, OpenVINO, torch.export."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from senet.errors import UserError
from senet.support.extras import optional

Format = Literal["onnx", "torch", "openvino"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
METADATA = "senet"  # the key under which an exported file says what it is
Run = Callable[[Tensor], Tensor]


def format_of(path: Path) -> Format:
    """The format of an exported file, by its ending.

    Raises:
        UserError: another ending.
    """
    for name in get_args(Format):
        if path.suffix == SUFFIXES[name]:
            return name
    endings = ", ".join(SUFFIXES.values())
    raise UserError(f"{path} is no exported network: its name must end in {endings}")


@dataclass(frozen=True)
class Exported:
    """An exported network, ready to run.

    Attributes:
        run: logits (N,K) of images (N,C,H,W), float32 on the CPU.
        metadata: what the file says: `classes`, `task` (see `senet.tasks`), `preprocessing`,
            `input_size`, `batch` (None for any), `config`, `form`, `precision`, `senet` (the
            version that wrote it).
        path: the file.
    """

    run: Run
    metadata: dict[str, Any]
    path: Path


def onnx_session(path: Path, threads: int | None = None) -> tuple[Run, dict[str, Any]]:
    """A network in ONNX Runtime, and its metadata."""
    ort = optional("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # warnings of the optimizer are of no use to users
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    stored = session.get_modelmeta().custom_metadata_map.get(METADATA, "{}")

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])

    return run, json.loads(stored)


@functools.cache
def _openvino_core() -> Any:
    """The process's one Core, as OpenVINO advises.

    When networks of several Cores had run, a process that later forked DataLoader workers died of a
    segmentation fault (OpenVINO 2026, PyTorch 2.14).
    """
    return optional("openvino").Core()


def openvino_session(path: Path, threads: int | None = None) -> tuple[Run, dict[str, Any]]:
    """A network in OpenVINO, in float32, and its metadata."""
    core = _openvino_core()
    model = core.read_model(str(path))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 is its default where the processor has it
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", settings)
    stored = model.get_rt_info([METADATA]).value if model.has_rt_info([METADATA]) else "{}"

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.contiguous().numpy())[0].copy())

    return run, json.loads(stored)


def torch_session(path: Path) -> tuple[Run, dict[str, Any]]:
    """A network that torch.export wrote, in PyTorch, and its metadata."""
    extra = {f"{METADATA}.json": ""}
    module = torch.export.load(str(path), extra_files=extra).module()

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x)

    return run, json.loads(extra[f"{METADATA}.json"] or "{}")


def open_exported(path: str | Path, *, threads: int | None = None) -> Exported:
    """Open an exported network in its runtime.

    Args:
        path: .onnx, .xml (OpenVINO) or .pt2 (torch.export).
        threads: threads of ONNX Runtime or OpenVINO; PyTorch's number by default.

    Raises:
        FileNotFoundError: no such file.
        UserError: another ending, a file that the runtime cannot read, or one that is not
            installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no exported network at {path}")
    format = format_of(path)
    # Said here, because these two runtimes print pages about it.
    if format == "torch" and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no file of torch.export: it is no zip archive")
    if format == "openvino" and not path.read_bytes().lstrip().startswith(b"<"):
        raise UserError(f"{path} is no network of OpenVINO: it is no XML")
    try:
        match format:
            case "onnx":
                run, metadata = onnx_session(path, threads)
            case "openvino":
                run, metadata = openvino_session(path, threads)
            case "torch":
                run, metadata = torch_session(path)
    except UserError:
        raise
    except Exception as error:  # each runtime has its own
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(f"{path} cannot be opened as a network: {reason[0]}") from error
    return Exported(run, metadata, path)
