"""What the core does without: modules of the package's extras, and what to install for them."""

import importlib
from typing import Any

from senet.errors import UserError

# What brings each module, by the name it is imported by (pyproject.toml).
_TRAIN, _EXPORT, _DATASETS = "'senet[train]'", "'senet[export]'", "'senet[datasets]'"
SOURCES = {
    "PIL": _TRAIN,
    "accelerate": _TRAIN,
    "cyclopts": _TRAIN,
    "docstring_parser": _TRAIN,
    "matplotlib": _TRAIN,
    "plotly": _TRAIN,
    "psutil": _TRAIN,
    "rich": _TRAIN,
    "scipy": _TRAIN,
    "tensorboard": _TRAIN,
    "tomli_w": _TRAIN,
    "torchdata": _TRAIN,
    "torchinfo": _TRAIN,
    "torchmetrics": _TRAIN,
    "torchvision": _TRAIN,
    "onnx": _EXPORT,
    "onnxruntime": _EXPORT,
    "onnxscript": _EXPORT,
    "openvino": _EXPORT,
    "datasets": _DATASETS,
    "timm": "timm",
}


def remedy(error: ImportError) -> str | None:
    """What to install for the module that is missing, in one line; None if that is no extra's."""
    missing = (error.name or "").partition(".")[0]
    if missing not in SOURCES:
        return None
    return f"{missing} is not installed: pip install {SOURCES[missing]}"


def optional(module: str) -> Any:
    """A module of an extra, or of a peer.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (line := remedy(error)) is None:
            raise
        raise UserError(line) from error
