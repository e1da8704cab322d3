"""Inference at the cost of the plain network: `optimize`."""

from senet.inference.optimization import OptimizedModel as OptimizedModel
from senet.inference.optimization import optimize as optimize
from senet.inference.report import OptimizationReport as OptimizationReport
