"""`senet train`: train a network."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from senet.cli.options import (
    MODEL_GROUP,
    NO_STEP,
    NO_TRAINING,
    RECIPE_GROUP,
    RUN_GROUP,
    OptionalWhole,
    StepFlags,
    Switch,
    TrainingFlags,
    given,
    is_place,
    named,
    read_toml,
)
from senet.errors import StopSignal, UserError
from senet.support.collector import importing
from senet.support.progress import Progress, Several, watch
from senet.support.text import duration

if TYPE_CHECKING:
    from senet.training.config import RunConfig
    from senet.training.recipe import Recipe

Track = Literal["wandb", "mlflow", "trackio"] | None


def train(
    *,
    model: Annotated[str | None, Parameter(group=MODEL_GROUP)] = None,
    flags: TrainingFlags = NO_TRAINING,
    scale_lr: Annotated[Switch, Parameter(group=RECIPE_GROUP)] = False,
    step: StepFlags = NO_STEP,
    init: Annotated[Path | None, Parameter(name=("--init", "--weights"), group=MODEL_GROUP)] = None,
    trained: Annotated[
        Literal["all", "se", "se+head", "head"] | None, Parameter(name="--train", group=MODEL_GROUP)
    ] = None,
    seed: Annotated[OptionalWhole, Parameter(group=RUN_GROUP)] = None,
    out: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None,
    resume: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None,
    track: Annotated[
        Literal["wandb", "mlflow", "trackio"] | None, Parameter(group=RUN_GROUP)
    ] = None,
) -> None:
    """Train a network into a new run folder, or go on with a run that was stopped.

    The folder holds config.toml, metrics.csv (a row an epoch), checkpoints/{last,best}, figures,
    report.html and TensorBoard events. Ctrl-C and SIGTERM stop after writing a checkpoint (exit
    codes 130 and 143). `torchrun --nproc-per-node=N -m senet train …` trains in N processes.

    Args:
        model: network; `senet models` lists them. Or timm:NAME, torchvision:NAME, or
            FILE.py:FUNCTION, a function that returns a module (default: se_resnet20_cifar for
            images of up to 64 pixels, se_resnet18 for larger ones).
        scale_lr: multiply the recipe's learning rate by --batch-size over the recipe's own (linear
            scaling rule), or of Adam's family by the square root of that.
        init: what to start from: a run, a checkpoint, such as one of `senet insert`, or
            hf_hub:owner/name; its network counts, and its preprocessing (of which --image-size
            changes the side). With --model a file of weights in any released layout, or
            pretrained: the network's best released weights (senet models --pretrained).
        trained: with --init, what learns: all, se (the SE blocks alone), se+head (and the
            classifier) or head; the rest, batch-norm statistics included, stays as it is
            (default: all).
        seed: of the first weights, the order of the images and their augmentation (default: 0).
        out: run folder; it must not exist (default: runs/ and the name of the data, with a number
            where there is one already).
        resume: run folder to go on with; its own configuration counts, but for --parallel, and
            --data and --data-root where the data were moved.
            "auto": go on with --out if it exists, else begin it.
        track: show the run in wandb, mlflow or trackio too, which must be installed.
    """
    flags.prepare_process()
    with importing():
        from senet.training.loop import Interrupted
        from senet.training.loop import resume as resume_run
        from senet.training.loop import train as train_run
        from senet.training.material import named_material
        from senet.training.ranks import leave_processes, rank

    if resume == Path("auto"):
        if out is None:
            raise UserError("--resume auto needs --out, the run folder to begin or go on with")
        resume = out if (out / "config.toml").is_file() else None
    elif resume is not None:
        if flags.config is not None:
            raise UserError("--resume goes on with the run's own configuration: leave out --config")
        if scale_lr:
            raise UserError(
                "--scale-lr belongs to the beginning of a run, --resume goes on with its learning "
                "rate: leave it out"
            )
    if model is not None and resume is None and is_place(model):
        raise UserError(
            f"--model {model} is a checkpoint: --init {model} begins with its weights, --resume "
            "goes on with a run"
        )
    options = given(flags.se) | given(flags.network)
    if init is not None and model is None:
        from senet.checkpoint.files import open_checkpoint

        model = open_checkpoint(init).model.config["name"]
    run_options = named(model=model, data=flags.data, seed=seed, out=out, init=init, train=trained)
    run_options |= given(flags.data_flags) | flags.machine.run_fields() | given(step)
    changes = flags.recipe_flags.changes()
    try:
        with watch() as progress, _tracked(progress, track) as heard:
            if resume is not None:
                if scale_lr:  # the same command begins and goes on: its rate must be the run's
                    table = _recipe_table(flags)
                    changes["lr"] = _recipe(flags, table, changes, run_options, scale_lr).lr
                refused = options | changes | run_options | named(recipe=flags.recipe)
                result = resume_run(resume, options=refused, progress=heard(resume))
            else:
                config, adapt, notes = _chosen(flags, changes, run_options, options, scale_lr)
                make = partial(named_material, adapt=adapt, notes=notes)
                result = train_run(config, progress=heard(config), make=make)
    except Interrupted as stopped:
        raise StopSignal(str(stopped), stopped.number) from stopped
    leave_processes()
    if rank() != 0:
        return
    from senet.commands.report import report_run
    from senet.experiments.runs import draw_run
    from senet.training.config import RUN_CONFIG, RunConfig
    from senet.training.data import open_run_data

    data = open_run_data(RunConfig.from_toml(result.run / RUN_CONFIG))
    draw_run(result, data)
    report_run(result, data)
    best = f"best {result.best_told()} (epoch {result.best_epoch})"
    print(f"{best}, {result.images_per_second:.0f} images/s, {duration(result.seconds)}")
    if trained in ("se", "se+head"):
        from senet.checkpoint.adapter import has_adapter, save_adapter
        from senet.checkpoint.files import open_checkpoint

        tuned = open_checkpoint(result.run).model
        if not has_adapter(tuned):
            print(f"Run: {result.run}")
            return
        size = save_adapter(tuned, result.run / "adapter.safetensors", head=trained == "se+head")
        print(f"Adapter for the original network: {size:,} bytes, adapter.safetensors")
    print(f"Run: {result.run}")


@contextmanager
def _tracked(
    progress: Progress, track: Track
) -> Iterator["Callable[[RunConfig | Path], Progress]"]:
    """Gives who hears of a run: the progress, and in the main process the tracker, if any."""
    from senet.training.config import RUN_CONFIG, RunConfig
    from senet.training.ranks import rank

    with ExitStack() as held:

        def heard(run: RunConfig | Path) -> Progress:
            if track is None or rank() != 0:
                return progress
            from senet.training.tracking import Tracking

            if isinstance(run, Path):
                run = RunConfig.from_toml(run / RUN_CONFIG, out=run)
            return Several([progress, held.enter_context(closing(Tracking(track, run)))])

        yield heard


def _chosen(
    flags: TrainingFlags,
    changes: dict[str, Any],
    run_options: dict[str, Any],
    options: dict[str, Any],
    scale_lr: bool,
) -> "tuple[RunConfig, set[str], list[str]]":
    """The run that the flags ask for, what of its recipe the data may change, and what was chosen.

    Args:
        flags: of the command.
        changes: fields of the recipe that were given.
        run_options: likewise, of the run.
        options: likewise, of the network.
        scale_lr: whether the learning rate follows the size of the batch.
    """
    from senet.training.config import RunConfig

    if not {"data", "model"} & run_options.keys():
        raise UserError(
            "--data is needed, such as a folder of images (or --data embedded for those that come "
            "with senet), or --resume RUN"
        )
    table = _recipe_table(flags)
    recipe = _recipe(flags, table, changes, run_options, scale_lr)
    notes = []
    if flags.recipe is None and not table:
        notes.append(f"recipe {recipe.name}, {recipe.epochs} epochs (--recipe takes another)")
    settings = {"model": "auto", "data": "embedded", **run_options}
    if "out" not in settings:
        settings["out"] = _free_folder(flags.data)
        notes.append(f"run folder {settings['out']} (--out takes another)")
    config = RunConfig(recipe=recipe, model_options=options, **settings)
    adapt = {"batch_size", "lr", "grad_clip"} - (changes.keys() | table.keys())
    # A file without grad_clip says that there is none.
    return config, adapt - {"grad_clip"} if table else adapt, notes


def _recipe_table(flags: TrainingFlags) -> dict[str, Any]:
    """What the file of --config says of the recipe; empty without one."""
    table = None if flags.config is None else read_toml(flags.config).get("recipe")
    return table if isinstance(table, dict) else {}


def _recipe(
    flags: TrainingFlags,
    table: dict[str, Any],
    changes: dict[str, Any],
    run_options: dict[str, Any],
    scale_lr: bool,
) -> "Recipe":
    """The recipe that was named, else that of the file's table [recipe], else the usual; changed.

    Args:
        flags: of the command.
        table: of `_recipe_table`.
        changes: as of `_chosen`.
        run_options: likewise.
        scale_lr: likewise.
    """
    name, usual = flags.recipe, "finetune" if "init" in run_options else "quick"
    if not scale_lr:
        return _unscaled(name, changes, table, usual)
    from senet.training.recipe import scaled_lr

    if "lr" in changes:
        raise UserError(f"--scale-lr sets the learning rate: leave out --lr {changes['lr']:g}")
    if "batch_size" not in changes:
        raise UserError("--scale-lr needs --batch-size, to compare with the recipe's own")
    own = {key: value for key, value in changes.items() if key != "batch_size"}
    lr = scaled_lr(_unscaled(name, own, table, usual), changes["batch_size"])
    return _unscaled(name, changes | {"lr": lr}, table, usual)


def _unscaled(
    name: str | None, changes: dict[str, Any], table: dict[str, Any], usual: str
) -> "Recipe":
    from senet.training.recipe import Recipe, changed, get_recipe

    if name is not None or not table:
        return get_recipe(name or usual, **changes)
    if not {"epochs", "batch_size", "lr", "schedule"} <= table.keys():
        return changed(get_recipe(**({"name": usual} | table)), **changes)
    return changed(Recipe.from_dict(table), **changes)


def _free_folder(data: str | None) -> Path:
    """A run folder that is not there yet, named after the data.

    Raises:
        UserError: several processes, which would not agree on one.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--out is needed where several processes share a run folder")
    last = re.split(r"[/\\:]", (data or "embedded").rstrip("/"))[-1]
    name = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "run"
    number, folder = 1, Path("runs") / name
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder
