"""Convolutions of float32 maps on the CPU, in kernels where these are faster than PyTorch's.

`description` is the operator `senet::convolution`, `rule` says which of its three passes (output,
gradient of the input, of the weights) the kernels compute, `cpu` calls them, and `pytorch` for the
other passes, `operator` puts them together. docs/performance.md says what was measured.
"""

from senet.ops.convolution.operator import convolve
from senet.ops.convolution.rule import Passes, chosen, packed, passes, use

__all__ = ["Passes", "chosen", "convolve", "packed", "passes", "use"]
