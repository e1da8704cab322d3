"""Squeeze-and-Excitation Networks (arXiv 1709.01507) that cost nothing extra."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from senet.checkpoint.adapter import load_adapter as load_adapter
    from senet.checkpoint.adapter import save_adapter as save_adapter
    from senet.fusion.fuse import FusionReport as FusionReport
    from senet.fusion.fuse import fuse as fuse
    from senet.fusion.fuse import unfuse as unfuse
    from senet.gates.fold import fold_gates as fold_gates
    from senet.gates.record import record_gates as record_gates
    from senet.gates.statistics import GateStatistics as GateStatistics
    from senet.inference import optimize as optimize
    from senet.insertion.insert import insert as insert
    from senet.insertion.insert import remove as remove
    from senet.models import list_models as list_models
    from senet.models.features import features as features
    from senet.networks.create import create_model as create_model
    from senet.nn.block import SqueezeExcitation as SqueezeExcitation
    from senet.runtimes.export import export as export
    from senet.weights import load_weights as load_weights
    from senet.weights import save_weights as save_weights

__version__ = "0.1.0"

# Where each public name lives; imported on first use, so that `import senet` loads no PyTorch.
_HOMES = {
    "FusionReport": "senet.fusion",
    "GateStatistics": "senet.gates.statistics",
    "SqueezeExcitation": "senet.nn.block",
    "anatomy": "senet.anatomy",
    "create_model": "senet.networks.create",
    "detection": "senet.detection",
    "export": "senet.runtimes.export",
    "features": "senet.models.features",
    "fold_gates": "senet.gates.fold",
    "fuse": "senet.fusion",
    "insert": "senet.insertion.insert",
    "list_models": "senet.models",
    "load_adapter": "senet.checkpoint.adapter",
    "load_weights": "senet.weights",
    "ops": "senet.ops",
    "optimize": "senet.inference",
    "record_gates": "senet.gates.record",
    "remove": "senet.insertion.insert",
    "save_adapter": "senet.checkpoint.adapter",
    "save_weights": "senet.weights",
    "segmentation": "senet.segmentation",
    "training": "senet.training",
    "unfuse": "senet.fusion",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'senet' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"senet.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
