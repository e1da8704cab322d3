"""The operators: each a description, an oracle and its implementations."""

from __future__ import annotations

from senet.ops import depthwise_convolution, join, pytorch, reference, tail
from senet.ops.algebra import depthwise as algebra_depthwise
from senet.ops.algebra import join as algebra_join
from senet.ops.algebra import tail as algebra_tail
from senet.ops.cpu import common as cpu
from senet.ops.cpu import depthwise as cpu_depthwise
from senet.ops.cpu import join as cpu_join
from senet.ops.cpu import tail as cpu_tail
from senet.ops.description import Kernels, Operator
from senet.ops.triton import common as triton
from senet.ops.triton import join as triton_join
from senet.ops.triton import tail as triton_tail

TAIL = Operator(
    tail.TAIL,
    reference=reference.tail,
    pytorch=pytorch.tail,
    algebra=algebra_tail,
    kernels={
        "triton": Kernels(triton.takes, triton_tail),
        "cpu": Kernels(cpu.takes, cpu_tail),
    },
)
JOIN = Operator(
    join.JOIN,
    reference=reference.join,
    pytorch=pytorch.join,
    algebra=algebra_join,
    kernels={
        "triton": Kernels(triton.takes, triton_join),
        "cpu": Kernels(cpu.takes, cpu_join),
    },
)
DEPTHWISE = Operator(
    depthwise_convolution.DEPTHWISE,
    reference=reference.depthwise,
    algebra=algebra_depthwise,
    kernels={"cpu": Kernels(cpu_depthwise.takes, cpu_depthwise)},
)
