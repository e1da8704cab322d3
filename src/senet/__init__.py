"""Squeeze-and-Excitation Networks (arXiv 1709.01507) that cost nothing extra."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from senet.factory import create_model as create_model
    from senet.layers import SqueezeExcitation as SqueezeExcitation
    from senet.models import list_models as list_models
    from senet.weights import load_weights as load_weights

__version__ = "0.1.0"

# Where each public name lives; imported on first use, so that `import senet` loads no PyTorch.
_HOMES = {
    "SqueezeExcitation": "senet.layers",
    "create_model": "senet.factory",
    "list_models": "senet.models",
    "load_weights": "senet.weights",
    "ops": "senet.ops",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'senet' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"senet.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
