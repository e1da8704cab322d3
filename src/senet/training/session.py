"""The moving parts of a run, and their state as a checkpoint holds it."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torchmetrics import MeanMetric

from senet.anatomy.example import attempt
from senet.anatomy.recording import run
from senet.data import Preprocessing, train_loader, val_loader
from senet.errors import SenetError, UserError
from senet.fusion import fuse
from senet.models.description import describe
from senet.networks.anywhere import channels_of, is_foreign, open_source
from senet.nn.sync_bn import convert
from senet.support.progress import Progress
from senet.training.config import RunConfig
from senet.training.data import open_run_data, without_deviation
from senet.training.evaluation import Evaluation, evaluate
from senet.training.finetuning import (
    as_the_checkpoint_says,
    freeze,
    prepare_start,
    starting_checkpoint,
)
from senet.training.fsdp import (
    forward_of,
    gathered,
    local,
    scattered_optimizer,
    scattered_weights,
    shard,
)
from senet.training.machine import accelerator_of, environment, random_state, set_random_state
from senet.training.optimizer import Average, build_optimizer, build_schedule
from senet.training.recipe import RECIPES, Recipe


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: whole epochs done, with their evaluation.
        done: steps done of the next one.
        step: steps done of all.
        seconds: training time of these `done` steps.
        history: rows of metrics.csv.
        timings: rows of timings.csv.
    """

    epoch: int = 0
    done: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)


class Session:
    """Everything that a step of the training reads or changes.

    Args:
        config: the run.
        preprocessing: how a run that is gone on with prepared its images so far; None at the start.

    Raises:
        UserError: unknown network, data or device, or sizes that do not go together.
    """

    def __init__(self, config: RunConfig, preprocessing: Preprocessing | None = None) -> None:
        recipe = self.recipe = config.recipe
        self.config = config
        self.processes_before: int | None = None
        self.accelerator = accelerator_of(config)
        start = None if config.init is None else starting_checkpoint(config)
        if start is None:
            # A wrong name or option is told before data are fetched.
            with nullcontext() if is_foreign(config.model) else torch.device("meta"):
                outline: Any = open_source(config.model, **config.model_options)
            least, own = outline.min_input_size, channels_of(config.model)
        else:
            least, own = start.model.min_input_size, start.model.config["in_channels"]
        # Grey images serve a network for colours as they are; of colours something would be lost.
        self.data = open_run_data(config, channels=3 if own == 3 else None)
        if preprocessing is not None:
            self.data = dataclasses.replace(self.data, preprocessing=preprocessing)
        elif start is not None:
            self.data = as_the_checkpoint_says(start, self.data, config)
            if recipe.normalisation == "mean" and _asked_for(recipe):
                self.data = without_deviation(self.data)
        size = self.data.preprocessing.image_size
        if size < least:
            raise UserError(
                f"{config.model} takes images of at least {least}×{least} pixels, {config.data} "
                f"gives {size}×{size}: give image_size={least} or more, or a *_cifar network"
            )
        self.train_loader, self.val_loader = self._loaders()
        self.steps_per_epoch = len(self.train_loader)
        self.total_steps = recipe.epochs * self.steps_per_epoch

        set_seed(config.seed)
        if start is None:
            model: Any = open_source(
                config.model,
                num_classes=len(self.data.classes),
                in_channels=self.data.preprocessing.channels,
                **config.model_options,
            )
        else:
            model = prepare_start(start, self.data, config.train)
        if config.sync_bn:
            convert(model)
        self.frozen_norms = freeze(model, config.train)
        if is_foreign(config.model):
            self._check_foreign(model)
        device, processes = self.accelerator.device, self.accelerator.num_processes
        self.sharded = config.parallel == "fsdp"
        if not self.sharded:  # which takes plain strides, and goes to the device block by block
            model.to(device, memory_format=torch.channels_last)
        self.model = model
        set_seed(config.seed + self.accelerator.process_index)  # dropout differs by process
        self.ema = Average(model, recipe.ema_decay) if recipe.ema_decay else None
        if self.sharded:
            for each in (model, self.ema.module) if self.ema else (model,):
                shard(each, device, processes)
        optimizer = build_optimizer(model, recipe)
        self.schedule = build_schedule(optimizer, recipe, self.steps_per_epoch)
        # With `evaluation_mode` accelerate adds autocast, and no DDP.
        self.wrapped = self.accelerator.prepare_model(model, evaluation_mode=self.sharded)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if config.compile:  # behind DDP and autocast, which then are part of the graph
            self.wrapped = torch.compile(self.wrapped, dynamic=False)
        self.meters = self._new_meters()

    def _check_foreign(self, model: nn.Module) -> None:
        """Fuse a network that is not of this package, where it gives what a training needs.

        Raises:
            UserError: it does not take the images, or gives something else than logits.
        """
        size, classes = self.data.preprocessing, len(self.data.classes)
        example = (torch.zeros(1, size.channels, size.image_size, size.image_size),)
        logits = attempt(partial(run, model, example), example)
        if not isinstance(logits, Tensor) or logits.shape != (1, classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"{self.config.model} gives {found} for an image where (1, {classes}) is needed, "
                f"a number for each of the {classes} classes"
            )
        if self.config.fuse:
            fuse(model, example)

    def _loaders(self) -> tuple[Any, Any]:
        recipe, processes = self.recipe, self.accelerator.num_processes
        if recipe.batch_size % processes:
            raise UserError(
                f"batch_size {recipe.batch_size} must be a multiple of the {processes} processes"
            )
        each = recipe.batch_size // processes
        if each % self.config.accumulate:
            raise UserError(
                f"accumulate {self.config.accumulate} must divide the {each} images a step of each "
                "process"
            )
        if self.config.parallel == "fsdp" and len(self.data.val) < processes:
            raise UserError(  # its forward pass needs every process
                f"parallel 'fsdp' needs an evaluation image for each of the {processes} processes, "
                f"{self.config.data} has {len(self.data.val)}: give --parallel ddp"
            )
        shard = {
            "num_workers": self.config.num_workers,
            "rank": self.accelerator.process_index,
            "world_size": processes,
            "batch_size": recipe.batch_size // processes,
            "pin_memory": self.accelerator.device.type == "cuda",
        }
        seed = self.config.seed
        training = train_loader(self.data, recipe.augmentation, seed=seed, **shard)
        return training, val_loader(self.data, **shard)

    def _new_meters(self) -> dict[str, MeanMetric]:
        # Values come one an image, so that their plain mean is that over images.
        names = ("train_loss", "train_top1")
        device = self.accelerator.device
        return {name: MeanMetric(nan_strategy="disable").to(device) for name in names}

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated and saved for use: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def description(self, position: Position) -> dict[str, Any]:
        """What the metadata of model.safetensors say."""
        return describe(
            self.model.config,
            self.data.preprocessing.to_dict(),
            self.data.classes,
            metrics=position.history[-1] if position.history and not position.done else None,
            run={**self.config.result_options(), "data_root": self.config.data_root},
            step=position.step,
        )

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, or those that are left after `restore`."""
        self.train_loader.set_epoch(epoch)
        return iter(self.train_loader)

    def train_step(self, images: Tensor, targets: Tensor, step: int) -> float:
        """One step of SGD, over `config.accumulate` parts one after the other; returns the loss.

        Args:
            images: (N,C,H,W), this process's part of the batch.
            targets: class numbers (N,), or shares of the classes (N,K) where images are mixed.
            step: number of the step, from 1.

        Raises:
            SenetError: the loss is not finite, or a block that FSDP gathers changes its input; no
                weight was changed.
        """
        recipe, device = self.recipe, self.accelerator.device
        for norm in self.frozen_norms:  # `evaluate` puts the whole network back into training mode
            norm.training = False
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        parts = self.config.accumulate
        losses, hits = [], []
        for number, (x, y) in enumerate(
            zip(images.chunk(parts), targets.chunk(parts), strict=True), start=1
        ):
            with self._gradients_stay() if number < parts else nullcontext():
                with forward_of(self.model):
                    logits = self._logits(x)
                each = F.cross_entropy(
                    logits, y, label_smoothing=recipe.label_smoothing, reduction="none"
                )
                self.accelerator.backward(each.mean() if parts == 1 else each.mean() / parts)
            losses.append(each.detach())
            hits.append((logits.argmax(dim=1) == (y if y.ndim == 1 else y.argmax(dim=1))).float())
        value = torch.cat(losses).mean().item()
        if self.anywhere(not math.isfinite(value)):
            raise self.diverged(f"loss is {value}", step)
        if recipe.grad_clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if step < self.total_steps and not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.meters["train_loss"].update(torch.cat(losses))
        self.meters["train_top1"].update(torch.cat(hits))
        return value

    def _logits(self, x: Tensor) -> Tensor:
        found = self.wrapped(x)
        if not isinstance(found, Tensor):
            raise UserError(
                f"{self.config.model} gives {type(found).__name__} in training, not logits alone: "
                "write a FILE.py:FUNCTION that builds it without auxiliary outputs"
            )
        return found.float()

    @contextmanager
    def _gradients_stay(self) -> Iterator[None]:
        """Gradients travel between processes once a step, with those of the last part."""
        if not self.sharded:
            with self.accelerator.no_sync(self.wrapped):
                yield
            return
        self.wrapped.set_requires_gradient_sync(False)
        yield
        self.wrapped.set_requires_gradient_sync(True)

    def evaluate(self, progress: Progress, stop: Any) -> Evaluation:
        """Judge the network of now on the validation set."""
        if self.accelerator.num_processes > 1:
            for buffer in self.judged.buffers():  # BN statistics differ; the saved ones count
                torch.distributed.broadcast(buffer, 0)
        alone = {"stop": stop} if self.accelerator.num_processes == 1 else {}
        return evaluate(
            self.judged,
            self.val_loader,
            self.data.classes,
            mixed_precision=self.recipe.mixed_precision,
            progress=progress,
            **alone,
        )

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum") > 0)

    def diverged(self, what: str, step: int) -> SenetError:
        """The error that ends a run whose numbers are no longer finite."""
        epoch = (step - 1) // self.steps_per_epoch + 1
        return SenetError(
            f"{what} at step {step} (epoch {epoch}, lr {self.lr:g}); the last good checkpoint is "
            f"kept in {self.config.out / 'checkpoints'}: try a lower lr or grad_clip=1"
        )

    def state(self, position: Position) -> dict[str, Any]:
        """All that `restore` needs, as tensors in plain containers.

        Every process must call it; the result in the main one counts. Sharded tensors are
        whole there.

        Raises:
            SenetError: a weight is not finite, so that this must not replace a good checkpoint.
        """
        modules: list[nn.Module] = [self.model, *([self.ema] if self.ema else [])]
        tensors = [pair for module in modules for pair in module.state_dict().items()]
        wrong = [name for name, tensor in tensors if not bool(local(tensor).isfinite().all())]
        if self.anywhere(bool(wrong)):
            raise self.diverged(f"{wrong[0] if wrong else 'a weight'} is not finite", position.step)
        mid_epoch = 0 < position.done < self.steps_per_epoch
        mine = {
            "random": random_state(self.accelerator.device),
            "loader": self.train_loader.state_dict() if mid_epoch else None,
            "meters": {name: meter.metric_state for name, meter in self.meters.items()},
        }
        scaler, main = self.accelerator.scaler, self.accelerator.is_main_process
        return {
            "position": dataclasses.asdict(position),
            "options": self.config.result_options(),
            "data": self._data_facts(),
            "environment": environment(self.config),
            "processes": gather_object([mine]),
            "model": gathered(self.model.state_dict(), main=main),
            "ema": gathered(self.ema.state_dict(), main=main) if self.ema else None,
            "optimizer": gathered(self.optimizer.state_dict(), main=main),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    def judged_weights(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """The state dict of `judged` within what `state` gave."""
        if not self.ema:
            return state["model"]
        inner = "module."
        return {k.removeprefix(inner): v for k, v in state["ema"].items() if k.startswith(inner)}

    def _data_facts(self) -> dict[str, Any]:
        data = self.data
        return {"train": len(data.train), "val": len(data.val), "classes": list(data.classes)}

    def check_data(self, state: dict[str, Any]) -> None:
        """Refuse a state that was taken with other data.

        Raises:
            UserError: other classes, or other numbers of images.
        """
        if state["data"] != self._data_facts():
            raise UserError(
                f"{self.config.data} is not what it was when the run began: it had "
                f"{state['data']}, now {self._data_facts()}; restore it, or start a new run"
            )

    def restore(self, state: dict[str, Any]) -> Position:
        """Go back to where `state` was taken; the random states follow in `restore_random`.

        Raises:
            UserError: it was taken with other data.
        """
        self.check_data(state)
        processes, index = state["processes"], self.accelerator.process_index
        if len(processes) != self.accelerator.num_processes:
            self.processes_before = len(processes)
        self.model.load_state_dict(scattered_weights(state["model"], self.model))
        if self.ema:
            self.ema.load_state_dict(scattered_weights(state["ema"], self.ema))
        self.optimizer.load_state_dict(scattered_optimizer(state["optimizer"], self.optimizer))
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        # Each process has its own sums; of other processes than now, the main one takes all.
        held = [processes[index]] if self.processes_before is None else processes
        for name, meter in self.meters.items():
            meter.update(torch.empty(0))  # or torchmetrics warns that it holds nothing
            for each in held if self.processes_before is None or index == 0 else ():
                meter.merge_state({k: v.to(meter.device) for k, v in each["meters"][name].items()})
        if held[0]["loader"] is not None:
            self.train_loader.load_state_dict(held[0]["loader"])
        return Position(**state["position"])

    def restore_random(self, state: dict[str, Any]) -> None:
        """Set the random number generators; after `batches`, which draws from them."""
        index = self.accelerator.process_index
        if index >= len(state["processes"]):  # a new process keeps what `set_seed` gave it
            return
        set_random_state(state["processes"][index]["random"], self.accelerator.device)

    def new_epoch(self) -> None:
        """Forget the metrics of the epoch before."""
        for meter in self.meters.values():
            meter.reset()


def _asked_for(recipe: Recipe) -> bool:
    """Whether its normalisation was given beside the recipe's name."""
    named = RECIPES.get(recipe.name)
    return named is None or recipe.normalisation != named.normalisation
