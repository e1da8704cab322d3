"""Optimizer, learning-rate schedule and moving average of a recipe."""

from collections.abc import Collection, Iterator
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from senet.training.fsdp import local
from senet.training.layers import layer_rates
from senet.training.optimizer_names import arguments_of, optimizer_class
from senet.training.recipe import Recipe

WARMUP_START = 0.01  # of the learning rate that the warm-up ends with


def build_optimizer(
    model: nn.Module, recipe: Recipe, new: Collection[str] = frozenset()
) -> Optimizer:
    """The recipe's optimizer over the trainable parameters.

    Parameters of one learning rate and one weight decay are a group; with one rate and no
    exemption from the decay there is a single one.

    Args:
        model: its parameters that require a gradient are trained.
        recipe: gives optimizer, learning rates and weight decay.
        new: names of the parameters that get `recipe.new_layer_lr` times the rate.
    """
    factors = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if recipe.layer_decay is not None:
        factors = layer_rates(model, recipe.layer_decay)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factors[name] * (recipe.new_layer_lr if name in new else 1.0)
        decayed = recipe.decay_norm_and_bias or parameter.ndim > 1
        group = groups.setdefault((not decayed, factor), {"params": [], "lr": recipe.lr * factor})
        group["params"].append(parameter)
        if not decayed:
            group["weight_decay"] = 0.0
    takes = arguments_of(recipe.optimizer)
    options: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if "betas" in takes:
        make = optimizer_class(recipe.optimizer)
        beta2 = recipe.beta2 or signature(make).parameters["betas"].default[1]
        options["betas"] = (recipe.momentum, beta2)
    else:
        options["momentum"] = recipe.momentum
    if recipe.nesterov:
        options["nesterov"] = True
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1]))]
    return optimizer_class(recipe.optimizer)(ordered, **options)


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
        highest = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(
            optimizer, highest, total_steps=total, pct_start=rise / total, cycle_momentum=False
        )
    main: LRScheduler
    if recipe.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, max(total - warmup, 1))
    elif recipe.schedule == "linear":
        main = LinearLR(optimizer, 1.0, 0.0, total_iters=max(total - warmup, 1))
    elif recipe.schedule == "exponential":
        main = ExponentialLR(optimizer, recipe.step_gamma ** (1 / steps_per_epoch))
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
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one step towards `model`.

        Nothing is read from the device: the number of updates stays on the CPU. `AveragedModel`'s
        own method would compare a copy of it there.
        """
        n = int(self.n_averaged)
        averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, now in zip(_tensors(self.module), _tensors(model), strict=True):
            if n and mine.is_floating_point():
                pair = averaged.setdefault(mine.dtype, ([], []))
                for tensors, tensor in zip(pair, (mine, now), strict=True):
                    tensors.append(local(tensor.detach()))
            else:  # BN's step counter is counted, not averaged
                mine.detach().copy_(now)
        step = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        for ours, theirs in averaged.values():
            step(ours, theirs, n)
        self.n_averaged += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
