"""Optimizer, learning-rate schedule and moving average of a recipe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from senet.training.fsdp import local
from senet.training.recipe import Recipe

WARMUP_START = 0.01  # of the learning rate that the warm-up ends with


def build_optimizer(model: nn.Module, recipe: Recipe) -> SGD:
    """SGD over the trainable parameters, those without weight decay in a group of their own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if recipe.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": parameters}]
    else:
        decayed = [p for p in parameters if p.ndim > 1]
        kept = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def build_schedule(optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """The learning rate of each step; call its `step()` once after each optimizer step.

    Args:
        optimizer: its learning rate is `recipe.lr`.
        recipe: gives the shape.
        steps_per_epoch: batches an epoch, at least 1.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if recipe.schedule == "one_cycle":
        total = max(total, 3)  # a step each to rise and to fall
        rise = min(max(warmup, 2), total - 1)
        return OneCycleLR(
            optimizer, recipe.lr, total_steps=total, pct_start=rise / total, cycle_momentum=False
        )
    main: LRScheduler
    if recipe.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, max(total - warmup, 1))
    elif recipe.schedule == "step":
        milestones = [round(epoch * steps_per_epoch) - warmup for epoch in recipe.step_epochs]
        main = MultiStepLR(optimizer, milestones, recipe.step_gamma)
    else:
        main = ConstantLR(optimizer, factor=1.0, total_iters=0)
    if not warmup:
        return main
    linear = LinearLR(optimizer, WARMUP_START, total_iters=warmup)
    return SequentialLR(optimizer, [linear, main], milestones=[warmup])


class Average(AveragedModel):
    """Exponential moving average of a model: parameters and floating buffers (BN statistics).

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the average forgets its
    random start in a short training too.

    Args:
        model: the model that is trained; copied.
        decay: of a step, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def update(ema: Sequence[Tensor], now: Sequence[Tensor], count: Tensor | int) -> None:
            n = float(count)
            step = get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))
            step([local(t) for t in ema], [local(t) for t in now], count)

        super().__init__(model, multi_avg_fn=update, use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one step towards `model`."""
        super().update_parameters(model)
        for mine, current in zip(self.module.buffers(), model.buffers(), strict=True):
            if not mine.is_floating_point():  # BN's step counter is counted, not averaged
                mine.copy_(current)
