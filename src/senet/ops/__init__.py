"""The operator: squeeze-and-excitation at no extra memory traffic, forward and backward.

`squeeze_excite` is the block alone, `bn_se_add_relu` the end of a residual branch (BN → SE → add →
ReLU, each part optional) in the two passes over memory that its batch norm needs anyway,
`bn_act_se` the middle of an MBConv (BN → activation → SE), `bn_relu_concat_se` the end of an
Inception module (BN → ReLU of each branch, joined, → SE). Five implementations agree:

- `reference`: the paper's equations in plain PyTorch, the oracle. It computes for all of them
  where a backward pass is differentiated itself (`create_graph=True`), and under torch.func.
- `algebra`: the closed-form backward in pure PyTorch; any device, and what torch.compile fuses.
- `pytorch`: PyTorch's own batch norm, activation and products, one pass after another; any device.
- `cpu`: C++ and OpenMP kernels for float32, bfloat16 and float64 on the CPU.
- `triton`: Triton kernels for CUDA and ROCm tensors; elsewhere in its interpreter, for tests.

`auto`, the default, takes `cpu` where it can, on a GPU `triton` for large maps and `pytorch` for
small ones, and `algebra` elsewhere. Choose with `use`, or with the environment variable SENET_OPS.

`tail` and `join` describe the two operators behind the four functions, `description` makes them of
that, `operators` names their implementations.
"""

from senet.ops.activations import Activation
from senet.ops.api import (
    bn_act_se,
    bn_relu_concat_se,
    bn_se_add_relu,
    depthwise,
    squeeze_excite,
)
from senet.ops.choice import Implementation, implementations, use
from senet.ops.recompute import recomputed
from senet.ops.reference import BRANCH_ACTIVATIONS, GATES, HIDDEN_ACTIVATIONS, BatchNorm

__all__ = [
    "BRANCH_ACTIVATIONS",
    "GATES",
    "HIDDEN_ACTIVATIONS",
    "Activation",
    "BatchNorm",
    "Implementation",
    "bn_act_se",
    "bn_relu_concat_se",
    "bn_se_add_relu",
    "depthwise",
    "implementations",
    "recomputed",
    "squeeze_excite",
    "use",
]
