"""The ends of residual blocks, from a convolution's output on: batch norm, SE, addition, ReLU.

Shape suffixes: N images, C channels, * spatial dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet import ops
from senet.nn.block import SqueezeExcitation, fusable, gate_parameters, leaves_process
from senet.nn.convolution import convolve
from senet.nn.sync_bn import SyncBatchNorm
from senet.support.shapes import Float


def bn_relu(x: Float[Tensor, "n c *s"], bn: nn.Module) -> Float[Tensor, "n c *s"]:
    """ReLU of batch-normalised x, shape and dtype of x; fused as in `residual_tail`."""
    return residual_tail(x, None, bn)


def bn_relu_into(
    x: Float[Tensor, "n c *s"],
    bn: nn.Module,
    consumer: nn.Module,
    se: SqueezeExcitation | None = None,
) -> Tensor:
    """consumer(relu(SE(BN(x)))), without keeping the consumer's input for the backward pass.

    A convolution keeps its input for the gradient of its weights. Here it is computed again from
    x, which the batch norm keeps anyway: one more pass, one map less in memory. Only where the C++
    kernels run eagerly, and without SE.

    Args:
        x: (N,C,*).
        bn: batch norm.
        consumer: a convolution or pooling layer that takes (N,C,*).
        se: SE block in between, or None.

    Returns:
        The consumer's output.
    """
    y = residual_tail(x, None, bn, se)
    if torch.compiler.is_compiling():
        return consumer(y)
    with ops.recomputed(y):
        return convolve(consumer, y)


def residual_tail(
    x: Float[Tensor, "n c *s"],
    shortcut: Float[Tensor, "n c *s"] | None,
    bn: nn.Module,
    se: SqueezeExcitation | None = None,
    shortcut_bn: nn.Module | None = None,
) -> Float[Tensor, "n c *s"]:
    """The end of a residual block: relu(SE(BN(x)) + BN(shortcut)).

    Runs as one operator (`senet.ops.bn_se_add_relu`) where it can. It steps aside to the modules
    themselves, and says so once, for anything but plain batch norms and an SE block of the
    standard form, and where one of them carries hooks, which the fused operator would not call.
    It also does in a graph that leaves the process (torch.export, a trace), which then holds only
    PyTorch's own operators.

    Args:
        x: output of the branch's last convolution, (N,C,*).
        shortcut: what is added, (N,C,*); None adds nothing.
        bn: batch norm of the branch.
        se: the SE block; None for a plain network.
        shortcut_bn: batch norm of a projection shortcut; None leaves the shortcut as it is.

    Returns:
        (N,C,*), dtype of x.
    """
    if leaves_process(x) or not fusable(bn, se, shortcut_bn):
        out = bn(x)
        if se is not None:
            out = se(out)
        if shortcut is not None:
            out = out + (shortcut if shortcut_bn is None else shortcut_bn(shortcut))
        return F.relu(out)
    assert isinstance(bn, _BatchNorm)
    shortcut_norm = None
    if isinstance(shortcut_bn, _BatchNorm) and shortcut is not None:
        if own_statistics(bn) == own_statistics(shortcut_bn):
            shortcut, shortcut_norm = step_norm(shortcut_bn, shortcut)
        else:  # one of them is frozen
            shortcut = shortcut_bn(shortcut)
    x, norm = step_norm(bn, x)
    gate = (None,) * 4 if se is None else gate_parameters(se)
    return ops.bn_se_add_relu(
        x,
        shortcut,
        *norm[:4],
        *gate,
        training=own_statistics(bn),
        momentum=norm.momentum,
        eps=norm.eps,
        gate="sigmoid" if se is None else se.gate_name,
        shortcut_norm=shortcut_norm,
    )


def _batch_statistics(bn: _BatchNorm) -> bool:
    """Whether a batch norm normalises by the batch's own statistics."""
    return bn.training or bn.running_mean is None


def own_statistics(bn: _BatchNorm) -> bool:
    """Whether the operator shall take the statistics from the batch it is given."""
    return _batch_statistics(bn) and not (isinstance(bn, SyncBatchNorm) and bn.synchronises)


def step_norm(bn: _BatchNorm, x: Tensor) -> tuple[Tensor, ops.BatchNorm]:
    """x and what the operator needs of a batch norm; counts the batch, as its forward does."""
    if isinstance(bn, SyncBatchNorm) and bn.synchronises:
        return bn.synchronise(x)
    momentum = bn.momentum
    if bn.training and bn.track_running_stats:
        batches = bn.num_batches_tracked
        if batches is not None:
            batches.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / float(batches)
    tracked = not bn.training or bn.track_running_stats
    return x, ops.BatchNorm(
        bn.weight,
        bn.bias,
        bn.running_mean if tracked else None,
        bn.running_var if tracked else None,
        0.0 if momentum is None else momentum,
        bn.eps,
    )
