"""The moving parts of a run, and their state as a checkpoint holds it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torchmetrics import MeanMetric

from senet.errors import SenetError, UserError
from senet.models.description import describe
from senet.support.progress import Progress
from senet.tasks.task import Judgement
from senet.training.config import RunConfig
from senet.training.evaluation import evaluate, first_tensor, in_float32, like, moved
from senet.training.fsdp import (
    forward_of,
    gathered,
    local,
    scattered_optimizer,
    scattered_weights,
    shard,
)
from senet.training.machine import accelerator_of, environment, random_state, set_random_state
from senet.training.material import Material, named_material
from senet.training.optimizer import Average, build_optimizer, build_schedule


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


@dataclass(frozen=True, eq=False)
class Step:
    """A step that was begun; on a GPU its numbers are on their way.

    Attributes:
        number: from 1.
        lr: its learning rate.
    """

    number: int
    lr: float
    _values: Tensor
    _copied: torch.cuda.Event | None

    def wait(self) -> tuple[float, bool, bool]:
        """Wait until it is done, but not for what was begun after it.

        Returns:
            The loss, whether that of any process is not finite, and whether any was asked to stop.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, wrong, stop = self._values.tolist()
        return loss, wrong > 0, stop > 0


class Session:
    """Everything that a step of the training reads or changes.

    Args:
        config: the run.
        make: gives what is trained and on what, once the processes know each other.

    Raises:
        UserError: unknown network, data or device, or sizes that do not go together.
    """

    def __init__(
        self,
        config: RunConfig,
        make: Callable[[RunConfig, Accelerator], Material] = named_material,
    ) -> None:
        self.processes_before: int | None = None
        self.accelerator = accelerator_of(config)
        self.material = material = make(config, self.accelerator)
        config = self.config = material.run
        recipe = self.recipe = config.recipe
        self.data, self.task = material.data, material.task
        self.train_loader, self.val_loader = material.train, material.val
        self.steps_per_epoch = len(material.train)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        model: Any = material.model
        self.frozen_norms = material.frozen_norms
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
        optimizer = build_optimizer(model, recipe, material.new)
        rates = [group["lr"] for group in optimizer.param_groups]
        self.told = rates.index(recipe.lr) if recipe.lr in rates else 0
        self.schedule = build_schedule(optimizer, recipe, self.steps_per_epoch)
        # With `evaluation_mode` accelerate adds autocast, and no DDP.
        self.wrapped = self.accelerator.prepare_model(model, evaluation_mode=self.sharded)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if config.compile:  # behind DDP and autocast, which then are part of the graph
            self.wrapped = torch.compile(self.wrapped, dynamic=False)
        self.meters = self._new_meters()

    def _new_meters(self) -> dict[str, MeanMetric]:
        # Values come one an image, so that their plain mean is that over images.
        names = ("train_loss", "train_top1") if self.task.counts_hits else ("train_loss",)
        device = self.accelerator.device
        return {name: MeanMetric(nan_strategy="disable").to(device) for name in names}

    @property
    def lr(self) -> float:
        """Learning rate of the next step, of layers that have the recipe's own."""
        return float(self.schedule.get_last_lr()[self.told])

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated and saved for use: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def description(self, position: Position, judgement: Judgement | None) -> dict[str, Any]:
        """What the metadata of model.safetensors say.

        Args:
            position: where the run is.
            judgement: the last one; what it says counts as long as no step followed it.
        """
        images, fresh = self.material.preprocessing, position.history and not position.done
        task = self.task.chosen(judgement) if judgement is not None and fresh else self.task
        return describe(
            self.material.config,
            None if images is None else images.to_dict(),
            self.material.classes,
            metrics=position.history[-1] if fresh else None,
            task=task.to_dict(),
            run={**self.config.result_options(), "data_root": self.config.data_root},
            step=position.step,
        )

    def batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The batches of an epoch, or those that are left after `restore`."""
        self.train_loader.set_epoch(epoch)
        return iter(self.train_loader)

    def train_step(self, images: Any, targets: Any, step: int, *, stop: bool = False) -> Step:
        """Begin a step of the optimizer, over `config.accumulate` parts one after the other.

        Nothing is read from the device, so that a GPU has work while the next step is prepared:
        `finished` tells the loss, best when the next step has begun. Until then nobody knows
        whether the loss is finite, and the weights must not be saved. (With fp16 the scaler of
        the gradients reads once a step whether they are finite; a loss, an optimizer or a loader of
        someone else may read more.)

        Args:
            images: (N,C,H,W), this process's part of the batch, or what else the network takes.
            targets: class numbers (N,), shares of the classes (N,K) where images are mixed,
                labels or numbers (N,K), or what else the task takes.
            step: number of the step, from 1.
            stop: whether this process was asked to stop, for the others to hear.

        Raises:
            SenetError: a block that FSDP gathers changes its input; no weight was changed.
        """
        recipe, device, lr = self.recipe, self.accelerator.device, self.lr
        for norm in self.frozen_norms:  # `evaluate` puts the whole network back into training mode
            norm.training = False
        images, targets = moved(images, device), moved(targets, device, plain=True)
        parts = self.config.accumulate
        losses, hits = [], []
        for number, (x, y) in enumerate(
            zip(split(images, parts), split(targets, parts), strict=True), start=1
        ):
            with self._gradients_stay() if number < parts else nullcontext():
                with forward_of(self.model):
                    outputs = self._outputs(x)
                each = self.task.loss(outputs, y)
                if each.ndim == 0:  # a mean
                    each = each.expand(len(first_tensor(y)))
                self.accelerator.backward(each.mean() if parts == 1 else each.mean() / parts)
            losses.append(each.detach())
            if self.task.counts_hits:
                right = outputs.argmax(dim=1) == (y if y.ndim == 1 else y.argmax(dim=1))
                hits.append(right.float())
        begun = Step(step, lr, *self._sent(torch.cat(losses).mean(), stop))
        if recipe.grad_clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if step < self.total_steps and not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.meters["train_loss"].update(torch.cat(losses))
        if hits:
            self.meters["train_top1"].update(torch.cat(hits))
        return begun

    def _sent(self, loss: Tensor, stop: bool) -> tuple[Tensor, torch.cuda.Event | None]:
        """What `Step.wait` reads, (3,), on its way to the CPU, and what tells that it has come."""
        flags = torch.stack([~loss.isfinite(), torch.full_like(loss, stop, dtype=torch.bool)])
        told: Any = flags.to(loss.dtype)
        if self.accelerator.num_processes > 1:
            told = self.accelerator.reduce(told, "sum")
        values = torch.cat([loss.view(1), told])
        if values.device.type != "cuda":
            return values, None
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return pinned, copied

    def finished(self, step: Step) -> tuple[float, bool]:
        """The loss of a step of `train_step`, and whether any process was asked to stop before it.

        Waits for that step alone.

        Raises:
            SenetError: the loss of any process is not finite. The weights of now are not to be
                used; those of the checkpoints are not touched.
        """
        loss, wrong, stop = step.wait()
        if wrong:
            raise self.diverged(f"loss is {loss}", step.number, step.lr)
        return loss, stop

    def _outputs(self, x: Any) -> Any:
        found = self.wrapped(x)
        if self.task.one_tensor and not isinstance(found, Tensor):
            raise UserError(
                f"{self.config.model} gives {type(found).__name__} in training, not logits alone: "
                "write a FILE.py:FUNCTION that builds it without auxiliary outputs"
            )
        return in_float32(found)

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

    def evaluate(self, progress: Progress, stop: Callable[[], bool]) -> Judgement:
        """Judge the network of now on the validation set."""
        if self.accelerator.num_processes > 1:
            for buffer in self.judged.buffers():  # BN statistics differ; the saved ones count
                torch.distributed.broadcast(buffer, 0)
        alone = self.accelerator.num_processes == 1  # the others would wait for this one
        return evaluate(
            self.judged,
            self.val_loader,
            self.task,
            mixed_precision=self.recipe.mixed_precision,
            progress=progress,
            stop=stop if alone else lambda: False,
        )

    def better(self, row: Mapping[str, float], than: Sequence[Mapping[str, float]]) -> bool:
        """Whether an epoch is better than all of others, by its row of metrics.csv."""
        return self.best([*than, row]) == len(than)

    def best(self, history: Sequence[Mapping[str, float]]) -> int:
        """Index of the best of some epochs, the first of equal ones."""
        values = [row[self.task.judged] for row in history]
        return values.index(max(values) if self.task.highest else min(values))

    def exhausted(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the recipe's patience is at its end."""
        patience = self.recipe.patience
        if patience is None or not history:
            return False
        return len(history) > patience + self.best(history)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum") > 0)

    def diverged(self, what: str, step: int, lr: float | None = None) -> SenetError:
        """The error that ends a run whose numbers are no longer finite.

        Args:
            what: is not finite.
            step: after which.
            lr: of that step (default: that of now).
        """
        epoch, lr = (step - 1) // self.steps_per_epoch + 1, self.lr if lr is None else lr
        return SenetError(
            f"{what} at step {step} (epoch {epoch}, lr {lr:g}); the last good checkpoint is "
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
            "data": dict(self.material.facts),
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

    def check_data(self, state: dict[str, Any]) -> None:
        """Refuse a state that was taken with other data.

        Raises:
            UserError: other classes, or other numbers of images.
        """
        if state["data"] != dict(self.material.facts):
            raise UserError(
                f"{self.config.data} is not what it was when the run began: it had "
                f"{state['data']}, now {dict(self.material.facts)}; restore it, or start a new run"
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


def split(batch: Any, parts: int) -> list[Any]:
    """A batch in parts: tensors along their first dimension, and those in containers."""
    if parts == 1:
        return [batch]
    if isinstance(batch, Tensor):
        return list(batch.chunk(parts))
    if isinstance(batch, Mapping):
        pieces = {key: split(value, parts) for key, value in batch.items()}
        return [{key: pieces[key][part] for key in pieces} for part in range(parts)]
    return [like(batch, part) for part in zip(*(split(each, parts) for each in batch), strict=True)]
