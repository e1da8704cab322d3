"""Squeeze-and-Excitation Networks (arXiv 1709.01507) that cost nothing extra."""

from typing import TYPE_CHECKING

from senet.support import lazy

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
    from senet.models.features import features as features
    from senet.networks.create import create_model as create_model
    from senet.networks.listing import list_models as list_models
    from senet.nn.block import SqueezeExcitation as SqueezeExcitation
    from senet.runtimes.export import export as export
    from senet.weights import load_weights as load_weights
    from senet.weights import save_weights as save_weights

__version__ = "0.2.0"

# Where each public name lives; imported on first use, so that `import senet` loads no PyTorch.
_HOMES = {
    "FusionReport": "fusion",
    "GateStatistics": "gates.statistics",
    "SqueezeExcitation": "nn.block",
    "anatomy": "anatomy",
    "create_model": "networks.create",
    "detection": "detection",
    "export": "runtimes.export",
    "features": "models.features",
    "fold_gates": "gates.fold",
    "fuse": "fusion",
    "insert": "insertion.insert",
    "list_models": "networks.listing",
    "load_adapter": "checkpoint.adapter",
    "load_weights": "weights",
    "ops": "ops",
    "optimize": "inference",
    "record_gates": "gates.record",
    "remove": "insertion.insert",
    "save_adapter": "checkpoint.adapter",
    "save_weights": "weights",
    "segmentation": "segmentation",
    "training": "training",
    "unfuse": "fusion",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    return lazy.attribute(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted(__all__)
