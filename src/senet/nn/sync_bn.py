"""Batch norm over the images of all processes, in a form that the fused operator can run.

PyTorch's own SyncBatchNorm takes GPUs only, and normalises in a pass of its own. Here the processes
exchange each channel's mean, variance and count (forward) and the two sums of its gradient
(backward), 2C + 1 and 2C numbers. With the statistics known, normalisation is that of evaluation
mode, which the operator of `senet.ops` fuses with SE, addition and ReLU; what the gradient lacks
then, that of the statistics, is added after it.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from senet.ops import BatchNorm

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """Batch norm of inputs (N,C,*), with the statistics of all processes in training mode.

    Where there is one process, or none was ever joined, and in evaluation mode it is plain batch
    norm; its state dict is that of plain batch norm. Each process must run it as often as the
    others, or they wait for each other; one without images runs it on an empty batch. With several
    processes it has no second derivatives in training mode: PyTorch raises where they are asked
    for.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    @property
    def synchronises(self) -> bool:
        """Whether its statistics come from other processes too, now."""
        return (
            (self.training or self.running_mean is None)
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )

    def synchronise(self, x: Tensor) -> tuple[Tensor, BatchNorm]:
        """Agree on the statistics of x, and take them into the running ones.

        Args:
            x: (N,C,*).

        Returns:
            x itself, with the gradient of the statistics attached to it, and what normalises it:
            weight, bias, mean (C,), biased variance (C,).
        """
        mean, var, count = statistics_of_all(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
            assert self.running_mean is not None
            assert self.running_var is not None
            unbiased = var * (count / (count - 1).clamp(min=1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                # Plain batch norm, too, learns nothing from an empty batch.
                running.lerp_(torch.where(count > 0, new.to(running.dtype), running), momentum)
        # In the dtype of the statistics, which PyTorch wants of both.
        weight = torch.ones_like(mean) if self.weight is None else self.weight.to(mean.dtype)
        bias = torch.zeros_like(mean) if self.bias is None else self.bias.to(mean.dtype)
        x, weight, bias = _ThroughStatistics.apply(
            x, weight, bias, mean, (var + self.eps).rsqrt(), count
        )
        return x, BatchNorm(weight, bias, mean, var, momentum, self.eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N,C,*); shape and dtype stay."""
        if not self.synchronises:
            return super().forward(input)
        self._check_input_dim(input)
        x, norm = self.synchronise(input)
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, self.eps
        )


@torch.no_grad()
def statistics_of_all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () of the channels of x (N,C,*), of all processes.

    In float32 at least, by the parallel formula of Chan, Golub and LeVeque (1979), which does not
    cancel where the mean is large. A process with an empty x takes part with a count of 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel():
        var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    else:  # whose mean is NaN, and NaN · 0 too
        var, mean = wide.new_zeros(2, x.shape[1])
    count = mean.new_full((1,), x.numel() / x.shape[1])
    mine = torch.cat((mean, var, count))
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    means, variances, counts = torch.stack(every).split((len(mean), len(mean), 1), dim=1)
    share = counts / counts.sum().clamp(min=1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), counts.sum()


class _ThroughStatistics(torch.autograd.Function):
    """Hands on x, weight and bias; backward, adds what flows through mean and variance to dx.

    With x̂ = (x - mean)/σ over M values of a channel, the whole gradient of batch norm is
    dx = dx_frozen - weight/(σM) · (Σ db + x̂ Σ dw), where db and dw are the gradients of bias and
    weight, and the sums go over all processes. dw and db stay each process's own: the training
    averages them like every other gradient. There is no second derivative: mean and 1/σ are
    numbers here, so that it would lack what flows through them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse: Tensor,
        count: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight, mean, inverse, count)
        return x.view_as(x), weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = gradients
        x, weight, mean, inverse, count = ctx.saved_tensors
        sums = torch.stack((db, dw)).to(mean.dtype)
        dist.all_reduce(sums)
        scale = weight * inverse / count.clamp(min=1)
        slope = scale * sums[1] * inverse
        offset = scale * sums[0] - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        slope, offset = (t.to(dx.dtype).view(shape) for t in (slope, offset))
        return torch.addcmul(dx, x, slope, value=-1).sub_(offset), dw, db, None, None, None


def convert(model: nn.Module) -> nn.Module:
    """Replace every plain batch norm within `model`; parameters and buffers are kept as they are.

    Returns:
        `model`, or its replacement where it is a batch norm itself.
    """
    if type(model) in _KINDS:
        assert isinstance(model, _BatchNorm)
        new = SyncBatchNorm(
            model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats
        )
        new.weight, new.bias = model.weight, model.bias
        for name, buffer in model.named_buffers(recurse=False):
            setattr(new, name, buffer)
        return new.train(model.training)
    for name, child in model.named_children():
        replaced = convert(child)
        if replaced is not child:
            setattr(model, name, replaced)
    return model
