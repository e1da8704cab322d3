"""What a run trains, and on what: made of its configuration, or handed over by `fit`."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from senet.anatomy.example import attempt
from senet.anatomy.recording import run
from senet.data import ImageData, Preprocessing, TrainLoader, train_loader, val_loader
from senet.data.arrays import WORDS, is_picture
from senet.data.image_data import is_other_kind
from senet.data.probe import SMALL
from senet.data.transforms import check_augmentation
from senet.errors import UserError
from senet.fusion import fuse
from senet.networks.anywhere import channels_of, is_foreign, open_source
from senet.nn.sync_bn import convert
from senet.tasks.task import Objective
from senet.training.config import AUTO, RunConfig
from senet.training.data import normalised, open_run_data
from senet.training.drop_path import drop_branches
from senet.training.finetuning import (
    as_the_checkpoint_says,
    fit_stem,
    freeze,
    is_for_others,
    kept_scale,
    new_parameters,
    prepare_start,
    starting_checkpoint,
)
from senet.training.recipe import RECIPES, Recipe, fitting_batch, scaled_lr
from senet.training.task import fitting, task_of

# What `senet train --data FOLDER` trains.
SMALL_IMAGES, LARGE_IMAGES = "se_resnet20_cifar", "se_resnet18"


class Batches(Protocol):
    """Training batches with an exact position, as `senet.data.TrainLoader` gives them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Any, Any]]: ...

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Material:
    """What a session trains, and on what.

    Attributes:
        run: the configuration, with what was left open in it chosen.
        model: the network, on the CPU.
        task: what its outputs mean.
        train: training batches.
        val: validation batches.
        facts: what tells these data from others; a run goes on with the same only.
        config: what the network is rebuilt from, see `senet.checkpoint.files.rebuild`.
        preprocessing: how an image becomes the network's input; None where nobody knows.
        classes: names in the order of the outputs, if they are classes.
        data: the data by name; None where they were handed over.
        new: names of the parameters that the weights it started from did not have.
        example: (1,C,H,W), or whatever the network takes.
        notes: what a user should read at the start.
    """

    run: RunConfig
    model: nn.Module
    task: Objective
    train: Batches
    val: Iterable[tuple[Any, Any]]
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    preprocessing: Preprocessing | None
    classes: tuple[str, ...]
    data: ImageData | None
    frozen_norms: Sequence[nn.Module] = ()
    new: frozenset[str] = field(default_factory=frozenset)
    notes: tuple[str, ...] = ()


def named_material(
    config: RunConfig,
    accelerator: Accelerator,
    *,
    preprocessing: Preprocessing | None = None,
    adapt: Collection[str] = (),
    notes: Sequence[str] = (),
) -> Material:
    """Network and data as a configuration names them; seeds the global random generators.

    Args:
        config: the run.
        accelerator: its processes share the images.
        preprocessing: how a run that is gone on with prepared its images so far; None at the start.
        adapt: see `completed`.
        notes: what a user should read at the start, before what is said here.

    Raises:
        UserError: unknown network or data, or sizes that do not go together.
    """
    start = None if config.init is None else starting_checkpoint(config)
    least, own = 1, None
    if start is not None:
        least, own = start.model.min_input_size, start.model.config["in_channels"]
    elif config.model != AUTO:
        # A wrong name or option is told before data are fetched; any number of classes will do.
        with nullcontext() if is_foreign(config.model) else torch.device("meta"):
            outline: Any = open_source(config.model, num_classes=1000, **config.model_options)
        least, own = outline.min_input_size, channels_of(config.model)
    # Grey images serve a network for colours as they are; of colours something would be lost.
    data = open_run_data(config, colours=own == 3)
    config, chosen = completed(config, data, accelerator.num_processes, adapt)
    recipe, left = fitting(config.recipe, data.task)
    config = dataclasses.replace(config, recipe=recipe)
    task = task_of(recipe, data)
    images = data.preprocessing
    check_augmentation(recipe.augmentation, images.channels, images.depth)
    measured = start is None or is_for_others(start, data)
    if start is not None:
        chosen = [*chosen, *fit_stem(start, data)]
    if preprocessing is not None:
        data = dataclasses.replace(data, preprocessing=preprocessing)
    elif start is not None:
        data = as_the_checkpoint_says(start, data, config)
        if recipe.normalisation != "mean_std" and _asked_for(recipe):
            data = normalised(data, recipe.normalisation)
    else:
        data = normalised(data, recipe.normalisation)
    size = data.preprocessing.image_size
    if size < least:
        raise UserError(
            f"{config.model} takes images of at least {least}×{least} pixels, {config.data} "
            f"gives {size}×{size}: give image_size={least} or more, or a *_cifar network"
        )
    training, validation = _loaders(config, accelerator, data)
    set_seed(config.seed)
    new: frozenset[str] = frozenset()
    if start is None:
        model: Any = open_source(
            config.model,
            num_classes=len(data.classes),
            in_channels=data.preprocessing.channels,
            **config.model_options,
        )
    else:
        model = prepare_start(start, data, config.train)
        task = kept_scale(start, task)
        new = new_parameters(start, model, data)
    example = torch.zeros(1, data.preprocessing.channels, size, size)
    frozen = prepared(model, config, example)
    if is_foreign(config.model):
        _check_foreign(model, config, example, len(data.classes))
    return Material(
        run=config,
        model=model,
        task=task,
        train=training,
        val=validation,
        facts=facts_of({"train": len(data.train), "val": len(data.val)}, data.classes, task),
        config=model.config,
        preprocessing=data.preprocessing,
        classes=data.classes,
        data=data,
        frozen_norms=frozen,
        new=new,
        notes=(*notes, *data.notes, *chosen, *left, *_notes(config, data, measured)),
    )


def facts_of(counts: Mapping[str, int], names: Sequence[str], task: Objective) -> dict[str, Any]:
    """What tells the data of a run from others: numbers of images, names, task; see `Material`."""
    plain = task.to_dict()
    return {**counts, "classes": list(names), **({} if plain is None else {"task": plain})}


def completed(
    config: RunConfig, data: ImageData, processes: int, adapt: Collection[str]
) -> tuple[RunConfig, list[str]]:
    """A configuration with what was left open chosen by the data, and what was chosen in words.

    Args:
        config: the run; its model may be "auto".
        data: its data.
        processes: how many share a step.
        adapt: which of "batch_size", "lr" and "grad_clip" may be others than the recipe's: where
            the training images make few batches, smaller ones are taken, and the rate that belongs
            to them; numbers are trained with gradients clipped, for a squared error has no bound.
    """
    recipe, notes = config.recipe, []
    if config.model == AUTO:
        size = data.preprocessing.image_size
        model = SMALL_IMAGES if size <= SMALL else LARGE_IMAGES
        notes.append(f"network {model}, for images of {size}×{size} pixels (--model takes another)")
        config = dataclasses.replace(config, model=model)
    if "batch_size" in adapt:
        size = fitting_batch(recipe, len(data.train), processes * config.accumulate)
        if size != recipe.batch_size:
            lr = scaled_lr(recipe, size) if "lr" in adapt else recipe.lr
            notes.append(
                f"batches of {size} and learning rate {lr:.3g}, where the recipe {recipe.name} has "
                f"{recipe.batch_size} and {recipe.lr:g}: there are {len(data.train)} training "
                "images (--batch-size and --lr take others)"
            )
            recipe = dataclasses.replace(recipe, batch_size=size, lr=lr)
    if "grad_clip" in adapt and data.task == "regression" and recipe.grad_clip is None:
        recipe = dataclasses.replace(recipe, grad_clip=1.0)
        notes.append("gradients clipped to 1, for numbers (--grad-clip takes another, or none)")
    return dataclasses.replace(config, recipe=recipe), notes


def prepared(model: nn.Module, config: RunConfig, example: Any) -> list[nn.Module]:
    """Make a network ready to be trained as a run says, in place.

    Args:
        model: the network.
        config: says what is trained, how batch norms and residual branches behave.
        example: what the network takes.

    Returns:
        The batch norms whose statistics must stay.
    """
    if config.sync_bn:
        convert(model)
    if config.recipe.drop_path:
        drop_branches(model, config.recipe.drop_path, example)
    return freeze(model, config.train)


def _check_foreign(model: nn.Module, config: RunConfig, example: Tensor, classes: int) -> None:
    """Fuse a network that is not of this package, where it gives what a training needs.

    Raises:
        UserError: it does not take the images, or gives something else than logits.
    """
    logits = attempt(partial(run, model, (example,)), (example,))
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"{config.model} gives {found} for an image where (1, {classes}) is needed, "
            "a number for each class, label or number"
        )
    if config.fuse:
        fuse(model, (example,))


def share_of_a_step(config: RunConfig, processes: int) -> int:
    """Images of a step that each process takes.

    Raises:
        UserError: they cannot be shared out equally, or not in `config.accumulate` parts.
    """
    batch_size = config.recipe.batch_size
    if batch_size % processes:
        raise UserError(f"batch_size {batch_size} must be a multiple of the {processes} processes")
    each = batch_size // processes
    if each % config.accumulate:
        raise UserError(
            f"accumulate {config.accumulate} must divide the {each} images a step of each process"
        )
    return each


def _loaders(config: RunConfig, accelerator: Accelerator, data: ImageData) -> tuple[Any, Any]:
    processes = accelerator.num_processes
    each = share_of_a_step(config, processes)
    if config.parallel == "fsdp" and len(data.val) < processes:
        raise UserError(  # its forward pass needs every process
            f"parallel 'fsdp' needs an evaluation image for each of the {processes} processes, "
            f"{config.data} has {len(data.val)}: give --parallel ddp"
        )
    shard = {
        "num_workers": config.num_workers,
        "rank": accelerator.process_index,
        "world_size": processes,
        "batch_size": each,
        "pin_memory": accelerator.device.type == "cuda",
    }
    return training_batches(config, data, **shard), val_loader(data, **shard)


def training_batches(config: RunConfig, data: ImageData, **shard: Any) -> TrainLoader:
    """The training batches of a run on data of `load_data`.

    Args:
        config: gives seed, augmentation and sampler.
        data: its training images.
        **shard: further arguments of `train_loader`.
    """
    recipe = config.recipe
    return train_loader(
        data,
        recipe.augmentation,
        seed=config.seed,
        balanced=recipe.sampler == "balanced",
        **shard,
    )


def _asked_for(recipe: Recipe) -> bool:
    """Whether its normalisation was given beside the recipe's name."""
    named = RECIPES.get(recipe.name)
    return named is None or recipe.normalisation != named.normalisation


def _notes(config: RunConfig, data: ImageData, measured: bool) -> tuple[str, ...]:
    notes = []
    if data.skipped:
        notes.append(f"images that cannot be read and are left out: {len(data.skipped)}")
    if (classes := len(data.classes)) < 5 and data.task == "classification":
        notes.append(f"there are {classes} classes: top-5 counts the top {classes}, always 100%")
    images = data.preprocessing
    mean, std = (
        " ".join(f"{value:.4g}" for value in values) for values in (images.mean, images.std)
    )
    if not is_picture(images.channels, images.depth):
        how = {"8": "divided by 255", "16": "divided by 65535", "float": "as they are"}
        pixels = f"{WORDS[images.depth]}, {how[images.depth]}"
        notes.append(f"images of {images.channels} channels, {pixels}")
    if measured and is_other_kind(images):
        notes.append(f"measured on the training images: mean {mean}, std {std}")
    if config.init is not None:
        kept = "" if measured else f", mean {mean}, std {std}"
        notes.append(
            f"images are prepared as init says: {images.image_size}×{images.image_size} "
            f"pixels{kept}"
        )
    return tuple(notes)
