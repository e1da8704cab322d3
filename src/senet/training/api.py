"""Train any network on any data from Python: `fit`, and `restore` afterwards."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from senet.anatomy.recording import evaluating
from senet.checkpoint.files import load_own
from senet.data import Augmentation, ImageData, val_loader
from senet.data.image_data import is_unmeasured
from senet.data.items import items_loader, items_val_loader
from senet.data.transforms import batch_transform
from senet.errors import UserError
from senet.models.description import WEIGHTS, read_described
from senet.networks.anywhere import PYTHON
from senet.support.progress import Progress, Several
from senet.tasks.classification import Classification
from senet.tasks.task import Objective
from senet.training.config import MACHINE, RUN_CONFIG, RunConfig, flatten
from senet.training.data import normalised
from senet.training.given import ReplayedLoader
from senet.training.loop import RunResult
from senet.training.loop import resume as resume_run
from senet.training.loop import train as train_run
from senet.training.material import Material, facts_of, prepared, share_of_a_step, training_batches
from senet.training.recipe import Recipe, get_recipe
from senet.training.task import Measuring, fitting, task_of

HANDED_OVER = "(handed over to fit)"
_OPTIONS = (
    "seed", "device", "num_workers", "accumulate", "sync_bn", "parallel", "compile",
    "checkpoint_steps", "timeout",
)  # fmt: skip
Transform = Callable[[Any], Any]


def fit(
    model: nn.Module,
    train: Any,
    val: Any = None,
    *,
    recipe: Recipe | str,
    out: str | PathLike[str],
    loss: Callable[[Any, Any], Tensor] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    judged: str | None = None,
    transforms: Transform | tuple[Transform | None, Transform | None] | None = None,
    callbacks: Sequence[Progress] = (),
    classes: Sequence[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> RunResult:
    """Train any network on any data: the loop, the checkpoints and the resume of `senet train`.

    Args:
        model: any module that takes a batch of images (or what else the data give) as its one
            argument; trained in place. At the end it holds the last weights, `restore` gives it
            the best ones.
        train: what `senet.data.load_data` gave; or a map-style data set of (image, target); or a
            DataLoader (any iterable of batches with a length). Of a data set each image's
            randomness depends on seed, epoch and number alone, and a run is resumed at any image;
            of a loader the batches of the epoch are drawn again (exactly, but for augmentation in
            persistent workers).
        val: likewise, for evaluation after each epoch; None where `train` has both.
        recipe: a recipe or its name. Of a data set or loader of yours only its mixup and cutmix
            change the images, and only for classes; a loader says itself how large batches are.
        out: the run folder: config.toml, metrics.csv, timings.csv, checkpoints, TensorBoard.
        loss: takes outputs (in float32) and targets, gives (N,) or the mean. None:
            cross-entropy of logits (N,K) and class numbers (N,), with the recipe's label smoothing;
            of data of `load_data` with labels or numbers what their task has.
        metrics: of torchmetrics, by the name of their column in metrics.csv; each takes outputs and
            targets. None: top-1 and top-5 for classes, mAP and F1 for labels and R² for numbers of
            `load_data`, none for a loss of yours.
        judged: the column by which the best epoch is chosen and `recipe.patience` counts: a metric
            (whose `higher_is_better` counts), or "val_loss"; by default top-1 for classes, else
            the first metric, else "val_loss".
        transforms: of an image of a data set of yours: one for all, or one for training and one for
            evaluation.
        callbacks: hear of each step and epoch, see `senet.support.progress.Progress`.
        classes: their names, for data of yours; by default their numbers.
        resume: go on with the run in `out` if there is one, exactly as if it had not been stopped.
        **options: seed (0), device ("auto"), num_workers (0), accumulate (1), sync_bn (False),
            parallel ("ddp"), compile (False), checkpoint_steps (0), timeout (None), as
            `RunConfig` has them.

    Returns:
        History, best epoch, last evaluation and speed.

    Raises:
        UserError: data, network, recipe and options do not go together; `out` exists and `resume`
            was not asked for, or its run had other options.
        SenetError: the loss is not finite, or the disk is full; the last good checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was written.

    Example:
        result = fit(model, train_set, val_set, recipe="finetune", out="runs/mine")
        restore(model, result.run)
    """
    if unknown := options.keys() - set(_OPTIONS):
        raise UserError(f"fit has no option {unknown.pop()!r}; there are {', '.join(_OPTIONS)}")
    known = getattr(model, "config", None)
    name = known["name"] if isinstance(known, Mapping) and "name" in known else None
    config = RunConfig(
        model=name or f"{PYTHON}{type(model).__module__}.{type(model).__qualname__}",
        data=train.name if isinstance(train, ImageData) else HANDED_OVER,
        recipe=get_recipe(recipe) if isinstance(recipe, str) else recipe,
        out=Path(out),
        **options,
    )
    given = _Given(model, train, val, loss, metrics, judged, transforms, classes)
    heard = Several(callbacks)
    if not resume or not (config.out / RUN_CONFIG).is_file():
        return train_run(config, progress=heard, make=given.material)
    before = flatten(RunConfig.from_toml(config.out / RUN_CONFIG).result_options())
    now = flatten(config.result_options())
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise UserError(
            f"the run in {config.out} was begun with other options ({', '.join(changed)}): give "
            "the same ones, or another folder"
        )
    machine = {name: value for name, value in options.items() if name in MACHINE}
    return resume_run(config.out, machine=machine, progress=heard, make=given.material)


def restore(model: nn.Module, run: str | PathLike[str], *, slot: str = "best") -> None:
    """Load the weights of a run of `fit` into its network.

    Args:
        model: the same network.
        run: the run folder.
        slot: "best", "last" or "previous".

    Raises:
        UserError: there is no such checkpoint, or it is of another network.
    """
    path = Path(run) / "checkpoints" / slot / WEIGHTS
    if not path.is_file():
        raise UserError(f"no weights at {path}: give a run folder, and slot best, last or previous")
    load_own(model, read_described(path)[1], f"weights {path} do not fit {type(model).__name__}")


@dataclasses.dataclass(frozen=True)
class _Given:
    """What `fit` was given, until the processes know each other."""

    model: nn.Module
    train: Any
    val: Any
    loss: Callable[[Any, Any], Tensor] | None
    metrics: Mapping[str, Metric] | None
    judged: str | None
    transforms: Transform | tuple[Transform | None, Transform | None] | None
    classes: Sequence[str] | None

    def material(self, config: RunConfig, accelerator: Accelerator) -> Material:
        train, recipe = self.train, config.recipe
        data = train if isinstance(train, ImageData) else None
        if (data is None) != (self.val is not None):
            remedy = "leave val out" if self.val is not None else "give val"
            raise UserError(f"data of load_data have both splits, other data need both: {remedy}")
        if data is not None and (self.transforms is not None or self.classes is not None):
            raise UserError("transforms and classes are for data of yours: leave them out")
        if data is None and recipe.sampler != "shuffled":
            raise UserError(
                f"sampler={recipe.sampler!r} is for data of load_data: give a loader with a "
                "WeightedRandomSampler"
            )
        share = {
            "batch_size": share_of_a_step(config, accelerator.num_processes),
            "num_workers": config.num_workers,
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "pin_memory": accelerator.device.type == "cuda",
        }
        notes: list[str] = []
        if data is not None:
            if self.loss is None and self.metrics is None:
                recipe, notes = fitting(recipe, data.task)
            if is_unmeasured(data.preprocessing):
                data = normalised(data, "mean_std")
            fitted = dataclasses.replace(config, recipe=recipe)
            training: Any = training_batches(fitted, data, **share)
            validation: Iterable[Any] = val_loader(data, **share)
            size = data.preprocessing
            example: Any = torch.zeros(1, size.channels, size.image_size, size.image_size)
            names = data.classes
            counts = {"train": len(data.train), "val": len(data.val)}
            notes = [*data.notes, *notes]
        else:
            on_train, on_val = (
                self.transforms
                if isinstance(self.transforms, tuple)
                else (self.transforms, self.transforms)
            )
            validation = self._validation(on_val, share)
            example = next(iter(validation))[0]
            names = tuple(self.classes) if self.classes else self._numbers(example)
            mix = batch_transform(recipe.augmentation, len(names)) if self.loss is None else None
            training = self._training(on_train, mix, config, share)
            counts = {"train": _length(train), "val": _length(self.val)}
        known: Any = getattr(self.model, "config", None)
        unnamed = {"name": config.model, "num_classes": len(names), "in_channels": None}
        unnamed["options"] = {}
        task, more = self._task(recipe, data, names)
        frozen = prepared(self.model, config, example)
        return Material(
            run=config,
            model=self.model.train(),
            task=task,
            train=training,
            val=validation,
            facts=facts_of(counts, names, task),
            config=unnamed if config.model.startswith(PYTHON) else known,
            preprocessing=None if data is None else data.preprocessing,
            classes=names,
            data=data,
            frozen_norms=frozen,
            notes=(*notes, *more),
        )

    def _training(
        self, transform: Transform | None, mix: Any, config: RunConfig, share: dict[str, Any]
    ) -> Any:
        if _is_items(self.train):
            options = {"transform": transform, "mix": mix, "seed": config.seed}
            return items_loader(self.train, **options, **share)
        if transform is not None:
            raise UserError("transforms are for a data set; a loader applies its own")
        if share["world_size"] > 1:
            raise UserError(
                "a loader gives every process the same images: give fit the data set, which it "
                "shares out"
            )
        return ReplayedLoader(_sized(self.train), config.seed, mix)

    def _validation(self, transform: Transform | None, share: dict[str, Any]) -> Iterable[Any]:
        if _is_items(self.val):
            return items_val_loader(self.val, transform=transform, **share)
        if share["world_size"] > 1:
            raise UserError("a loader gives every process the same images: give fit the data set")
        return _sized(self.val)

    def _numbers(self, images: Any) -> tuple[str, ...]:
        """Names of the classes, as many as the network has outputs; none for a loss of yours."""
        if self.loss is not None:
            return ()
        with evaluating(self.model), torch.inference_mode():
            logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"{type(self.model).__name__} gives {found}, where cross-entropy needs logits "
                "(N,K): give a loss"
            )
        return tuple(str(number) for number in range(logits.shape[1]))

    def _task(
        self, recipe: Recipe, data: ImageData | None, names: tuple[str, ...]
    ) -> tuple[Objective, list[str]]:
        notes = []
        if data is None and _of_images(recipe.augmentation):
            notes.append(
                "of the recipe's augmentation only mixup and cutmix change data of your own: give "
                "transforms for the rest"
            )
        if self.loss is None and self.metrics is None:
            usual = Classification(names) if data is None else task_of(recipe, data)
            if self.judged not in (None, usual.judged):
                raise UserError(f"judged {self.judged!r} needs metrics: give them, or leave it out")
            if data is not None:
                return usual, notes
            if recipe.class_weights != "none":
                raise UserError(
                    f"class_weights={recipe.class_weights!r} counts the images of load_data: give "
                    "a loss of your own with weights"
                )
            return Classification(names, recipe.label_smoothing), notes
        loss = self.loss or partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
        unused = [name for name in ("label_smoothing", "class_weights") if _differs(recipe, name)]
        if self.loss is not None and unused:
            notes.append(f"{' and '.join(unused)} of the recipe do not change a loss of your own")
        metrics = dict(self.metrics or {})
        return Measuring(loss, metrics, self.judged or next(iter(metrics), "val_loss")), notes


def _is_items(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _sized(loader: Any) -> Any:
    if not hasattr(loader, "__len__"):
        raise UserError(
            f"{type(loader).__name__} has no length, which the schedule needs: give a loader with "
            "one, or a map-style data set"
        )
    return loader


def _length(data: Any) -> int:
    """Images of a data set, or of a loader that tells; else its batches."""
    items = data.dataset if isinstance(data, DataLoader) else data
    return len(items) if hasattr(items, "__len__") else len(data)


def _differs(recipe: Recipe, name: str) -> bool:
    return getattr(recipe, name) not in (0.0, "none")


def _of_images(augmentation: Augmentation) -> bool:
    plain = Augmentation(mixup=augmentation.mixup, cutmix=augmentation.cutmix)
    return augmentation != plain
