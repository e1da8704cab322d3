"""Inference at the cost of the plain network: `optimize`."""

from senet.inference.optimization import OptimizationReport as OptimizationReport
from senet.inference.optimization import OptimizedModel as OptimizedModel
from senet.inference.optimization import optimize as optimize
