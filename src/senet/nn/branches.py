"""The end of an Inception module: BN → ReLU of each branch, joined along the channels, → SE."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet import ops
from senet.nn.block import SqueezeExcitation, fusable, gate_parameters, leaves_process
from senet.nn.tails import own_statistics, step_norm
from senet.support.shapes import Float


def joined(
    ends: Sequence[tuple[Float[Tensor, "n _ *s"], nn.Module | None]],
    se: SqueezeExcitation | None = None,
) -> Float[Tensor, "n c *s"]:
    """SE(concat(relu(BN(x)) of each branch)).

    Runs as one operator (`senet.ops.bn_relu_concat_se`) where it can, and steps aside to the
    modules themselves, each for itself, where `senet.nn.tails.residual_tail` does.

    Args:
        ends: of each branch the output (N,C_i,*) of its last convolution and the batch norm behind
            it; None instead of a batch norm takes the map as it is, without ReLU.
        se: the SE block of the joined map (N,ΣC_i,*); None for a plain network.

    Returns:
        (N,ΣC_i,*).
    """
    apart = leaves_process(ends[0][0])
    maps: list[Tensor] = []
    norms: list[ops.BatchNorm | None] = []
    training: list[bool] = []
    for x, bn in ends:
        norm, own = None, False
        if isinstance(bn, _BatchNorm) and not apart and fusable(bn):
            own = own_statistics(bn)
            x, norm = step_norm(bn, x)
        elif bn is not None:
            x = F.relu(bn(x))
        maps.append(x)
        norms.append(norm)
        training.append(own)
    fused = se is not None and not apart and fusable(se)
    if apart or not (fused or any(norms)):  # nothing is left for the operator
        y = torch.cat(maps, 1)
        return y if se is None else se(y)
    if se is None or not fused:
        y = ops.bn_relu_concat_se(maps, norms, training=training)
        return y if se is None else se(y)
    gate = gate_parameters(se)
    return ops.bn_relu_concat_se(maps, norms, *gate, training=training, gate=se.gate_name)
