"""Squeeze-and-Excitation Networks (arXiv 1709.01507) that cost nothing extra."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from senet.adapters import load_adapter as load_adapter
    from senet.adapters import save_adapter as save_adapter
    from senet.backbones import features as features
    from senet.export_network import export as export
    from senet.factory import create_model as create_model
    from senet.folding import fold_gates as fold_gates
    from senet.gate_statistics import GateStatistics as GateStatistics
    from senet.gates import record_gates as record_gates
    from senet.inference import optimize as optimize
    from senet.insertion import insert as insert
    from senet.insertion import remove as remove
    from senet.layers import SqueezeExcitation as SqueezeExcitation
    from senet.models import list_models as list_models
    from senet.weights import load_weights as load_weights
    from senet.weights import save_weights as save_weights

__version__ = "0.1.0"

# Where each public name lives; imported on first use, so that `import senet` loads no PyTorch.
_HOMES = {
    "GateStatistics": "senet.gate_statistics",
    "SqueezeExcitation": "senet.layers",
    "create_model": "senet.factory",
    "detection": "senet.detection",
    "export": "senet.export_network",
    "features": "senet.backbones",
    "fold_gates": "senet.folding",
    "insert": "senet.insertion",
    "list_models": "senet.models",
    "load_adapter": "senet.adapters",
    "load_weights": "senet.weights",
    "ops": "senet.ops",
    "optimize": "senet.inference",
    "record_gates": "senet.gates",
    "remove": "senet.insertion",
    "save_adapter": "senet.adapters",
    "save_weights": "senet.weights",
    "segmentation": "senet.segmentation",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'senet' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"senet.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
