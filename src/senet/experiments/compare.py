"""Train a network with and without SE alternately, and gather what they show."""

import multiprocessing
import os
import shutil
import signal
import statistics
import threading
import time
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from multiprocessing.synchronize import Event
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Self, get_args

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray

from senet.anatomy import excitations
from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.data import Augmentation, ImageData, absolute_data
from senet.data.image_data import only_classes
from senet.data.load import check_outside
from senet.errors import SenetError, UserError
from senet.experiments.runs import examine, read_rows
from senet.models.cost import count_multiply_adds, count_parameters
from senet.models.registry import entry
from senet.networks.anywhere import WITHOUT_SE, is_foreign, open_source
from senet.reports.comparison import Comparison, NetworkResult, write_report
from senet.reports.figures import neutral_gate
from senet.support.files import atomic_write
from senet.support.progress import Progress
from senet.support.signals import first_signal
from senet.support.text import decoded
from senet.support.trust import check_trusted
from senet.tasks.task import Judgement
from senet.training.config import RUN_CONFIG, RunConfig, absolute_model, holdable
from senet.training.data import open_run_data
from senet.training.loop import Interrupted, RunResult, stop_runs
from senet.training.loop import resume as resume_run
from senet.training.loop import train as train_run
from senet.training.recipe import Recipe, get_recipe

# What a short training needs (measured for ResNet-8 on the embedded data): gates that start at 1,
# a hidden layer of more than a few units, and epochs that leave the demo under five minutes.
QUICK_SE_OPTIONS: Mapping[str, Any] = {"reduction": 4, "gate": "identity_sigmoid"}
QUICK_EPOCHS = 4
# In config.toml, as for a flag: a field of the recipe that is taken away.
NONE = "none"
# What to do with data of other tasks.
TRAIN_BOTH = "train with and without SE by senet train"

# Label, and how many of how many runs are done.
Watch = Callable[[str, int, int], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison.

    Attributes:
        out: folder of the comparison.
        model: name of the plain network or of its SE twin; or a network with SE of timm,
            torchvision or a file, which is compared with itself without its SE blocks.
        model_options: options of both networks.
        se_options: options of the SE blocks; with the recipe quick, those of `QUICK_SE_OPTIONS`
            hold where they are not given.
        data: data set or folder.
        data_options: fields of `RunConfig` that say how data are read.
        recipe: name of the recipe.
        recipe_options: fields of `Recipe` that differ from it; quick has `QUICK_EPOCHS` epochs.
        seeds: runs of each network, with the seeds 0, 1, ….
        processes: runs at the same time, each in a process of its own with its share of the cores.
        machine: fields of `RunConfig` that do not change the result: num_workers, device, ….

    Raises:
        UserError: unknown model or recipe, `seeds` or `processes` < 1, or an option out of range.
    """

    OWN: ClassVar[tuple[str, ...]] = ("model", "data", "recipe", "seeds", "processes")
    COMMAND: ClassVar[str] = "compare"

    out: Path
    model: str = "resnet8_cifar"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    se_options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "embedded"
    data_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "quick"
    recipe_options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3
    processes: int = 1
    machine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if self.processes < 1:
            raise UserError(f"processes must be at least 1, got {self.processes}")
        if self.foreign:
            self._check_foreign()
        else:
            named = entry(self.model)
            object.__setattr__(self, "model", named.twin if named.se else self.model)
        if self.recipe == "quick":
            defaults = {} if self.foreign else QUICK_SE_OPTIONS
            object.__setattr__(self, "se_options", {**defaults, **self.se_options})
            options = {"epochs": QUICK_EPOCHS, **self.recipe_options}
            object.__setattr__(self, "recipe_options", options)
        self.training_recipe()

    def _check_foreign(self) -> None:
        """Raise UserError for options, which a network that is not of this package has none of."""
        if wrong := [*self.model_options, *self.se_options]:
            raise UserError(
                f"{self.model} is compared as it is, without {', '.join(wrong)}: options are for "
                "networks of this package (senet models); build another one by FILE.py:FUNCTION"
            )

    @property
    def foreign(self) -> bool:
        """Whether the network is of timm, torchvision or a file."""
        return is_foreign(self.model)

    @property
    def started(self) -> bool:
        """Whether the folder exists, so that the comparison can be resumed."""
        return (self.out / RUN_CONFIG).is_file()

    def training_recipe(self) -> Recipe:
        """The recipe of every run."""
        return get_recipe(self.recipe, **self.recipe_options)

    def runs(self) -> dict[str, list[RunConfig]]:
        """The runs of each network, "plain" and "se", in the order of the seeds."""
        if self.foreign:
            return {
                "plain": self._seeds("plain", self.model, {WITHOUT_SE: True}),
                "se": self._seeds("se", self.model, {}),
            }
        networks = {
            "plain": (self.model, dict(self.model_options)),
            "se": (entry(self.model).twin, {**self.model_options, **self.se_options}),
        }
        return {kind: self._seeds(kind, *network) for kind, network in networks.items()}

    def _seeds(self, folder: str, model: str, options: dict[str, Any]) -> list[RunConfig]:
        """A run for each seed."""
        return [
            RunConfig(
                model=model,
                model_options=options,
                data=self.data,
                recipe=self.training_recipe(),
                seed=seed,
                out=self.out / folder / f"seed{seed}",
                **self.data_options,
                **self.machine,
            )
            for seed in range(self.seeds)
        ]

    def to_toml(self) -> str:
        """The text of config.toml, whose keys are the flags of the command.

        Raises:
            UserError: a path that it cannot hold.
        """
        tables = ("model_options", "se_options", "data_options", "recipe_options", "machine")
        values: dict[str, Any] = {name: getattr(self, name) for name in self.OWN}
        values["data"] = holdable(
            "data", absolute_data(self.data)
        )  # found from any working directory, like the file of a network
        values["model"] = holdable("model", absolute_model(self.model))
        for table in tables:
            for key, value in getattr(self, table).items():
                if value is not None:
                    values[key] = list(value) if isinstance(value, tuple) else _plain(value)
                elif table == "recipe_options":  # the recipe of that name has another
                    values[key] = NONE
        if "data_root" in values:
            root = str(Path(values["data_root"]).absolute())
            values["data_root"] = holdable("data_root", root)
        head = f"# Reruns exactly: senet {self.COMMAND} --config THIS_FILE --out NEW_FOLDER\n"
        return head + tomli_w.dumps(values)

    @classmethod
    def of_flags(cls, options: Mapping[str, Any]) -> Self:
        """A configuration from the flags that were given.

        Raises:
            UserError: no `out`, or as for the class.
        """
        if "out" not in options:
            raise UserError("--out FOLDER is needed (or --resume FOLDER)")
        return cls(**options)

    @classmethod
    def of_folder(cls, out: Path, refused: Mapping[str, Any]) -> Self:
        """The configuration that `write` left in a folder.

        Args:
            out: the folder.
            refused: flags that were given together with --resume; none may be.

        Raises:
            UserError: the folder holds no comparison, a flag was given, or the network is of a
                file that this user never named.
        """
        for name, value in refused.items():
            if value != {}:
                shown = name if not isinstance(value, Mapping) else next(iter(value))
                raise UserError(
                    f"--resume goes on with the folder's own options: leave out "
                    f"--{shown.replace('_', '-')}, or start a new one with --out"
                )
        path = out / RUN_CONFIG
        try:
            values = tomllib.loads(decoded(path.read_bytes()))
        except FileNotFoundError:
            raise UserError(
                f"{out} is no folder of senet {cls.COMMAND}: {RUN_CONFIG} is missing"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a TOML file: {error}") from error
        values.setdefault("processes", 1)  # comparisons from before it was an option
        missing = [name for name in cls.OWN if name not in values]
        if missing or ("ablation" in values) != ("ablation" in cls.OWN):
            raise UserError(
                f"{path} is not that of senet {cls.COMMAND}; for a run: senet train --resume"
            )
        check_trusted(str(values["model"]), named_by=str(path))
        run_fields = {f.name for f in fields(RunConfig)}
        recipe_fields = {f.name: f for kind in (Recipe, Augmentation) for f in fields(kind)}
        own: dict[str, Any] = {"out": out}
        for key, value in values.items():
            if key in cls.OWN:
                own[key] = value
            elif key in run_fields:
                own.setdefault("machine", {})[key] = value
            elif key in recipe_fields:
                optional = NoneType in get_args(recipe_fields[key].type)
                plain = None if optional and value == NONE else value
                own.setdefault("recipe_options", {})[key] = plain
            elif is_foreign(values["model"]) or key in entry(values["model"]).options:
                own.setdefault("model_options", {})[key] = value
            else:
                own.setdefault("se_options", {})[key] = value
        return cls(**own)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def run_comparison(
    config: CompareConfig, *, watch: Watch, tell: Callable[[str], None], resume: bool = False
) -> Comparison:
    """Train all runs that are not finished, seed by seed and alternately, and write the report.

    Args:
        config: the comparison.
        watch: opens a progress display for the run of that label; with one process.
        tell: called with a line for each run that ended; with several processes.
        resume: go on in the existing folder; finished runs are kept.

    Returns:
        What `senet.reports.comparison` needs; the folder then holds results.json, figures and
        report.html.

    Raises:
        UserError: the folder exists and `resume` is False, or a run's own reasons.
        SenetError: a run failed.
    """
    runs = config.runs()
    data = open_run_data(runs["plain"][0])  # bad data are found before anything is written
    only_classes(data, "senet compare compares top-1 of classes", TRAIN_BOTH)
    if config.foreign and not resume:
        _check_twins(config)
    if not resume:
        make_folder(config)
    order = [run for pair in zip(runs["plain"], runs["se"], strict=True) for run in pair]
    trained = train_all(config, order, watch, lambda run: f"{run.label} seed {run.seed}", tell)
    comparison = gather(config, data, trained)
    write_report(comparison, config.out)
    return comparison


def _check_twins(config: CompareConfig) -> None:
    """Raise UserError where the network has no SE, or cannot be without."""
    try:
        open_source(config.model, num_classes=1000, **{WITHOUT_SE: True})
    except UserError as error:
        raise UserError(
            f"{config.model} cannot be compared with itself without SE: {error}; a network without "
            "SE gets some by senet insert, or by FILE.py:FUNCTION"
        ) from error


def begin_or_go_on(run: RunConfig, progress: Progress | None = None) -> RunResult:
    """Train a run from the start, or from where it was stopped."""
    if (run.out / RUN_CONFIG).is_file():
        return resume_run(run.out, progress=progress)
    return train_run(run, progress=progress)


def train_all(
    config: CompareConfig,
    order: Sequence[RunConfig],
    watch: Watch,
    label: Callable[[RunConfig], str],
    tell: Callable[[str], None],
) -> dict[Path, Judgement]:
    """Train the runs that are not finished, one after the other or some at the same time.

    Args:
        config: says how many at a time.
        order: all runs.
        watch: opens a progress display for the run of that label; with one process.
        label: of a run.
        tell: called with a line for each run that ended; with several processes.

    Returns:
        By folder, how the runs were judged after their last epoch; of those that this process
        trained.

    Raises:
        UserError: a run was refused; if it was before anything was trained, the folder is gone.
        SenetError: a run failed.
    """
    judged: dict[Path, Judgement] = {}
    try:
        if config.processes > 1:
            left = [run for run in order if not finished(run)]
            _train_in_processes(config, left, label, tell)
            return judged
        for index, run in enumerate(order):
            if finished(run):
                continue
            with watch(label(run), index, len(order)) as progress:
                judged[run.out] = begin_or_go_on(run, progress).evaluation
    except UserError:
        if not any(run.out.exists() for run in order):
            shutil.rmtree(config.out)
        raise
    return judged


# What stopped this worker, or shall stop it.
_stop: BaseException | None = None
# Held while a run is at hand in this worker.
_working = threading.Lock()


def _begin_worker(processes: int, out: Path, asked: Event) -> None:
    """Give a worker its threads, and let it stop with the process that began it."""
    global _stop
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, (cores or 1) // processes))
    if asked.is_set():  # while this worker still loaded its modules
        _stop = Interrupted(out)
    threading.Thread(target=_stop_with_parent, args=(out, asked), daemon=True).start()


def _stop_with_parent(out: Path, asked: Event) -> None:
    """Stop the run at hand once the parent asks for it or is gone; without a parent, end.

    Not by a signal: together with one that the whole group of processes gets, as from Ctrl-C, it
    would be the second one, which ends a run without its checkpoint.
    """
    global _stop
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive() and not asked.wait(0.5):
        pass
    _stop = _stop or Interrupted(out)
    while True:
        stop_runs()
        if not parent.is_alive() and _working.acquire(blocking=False):
            os._exit(128 + signal.SIGTERM)  # the queue of jobs has no end that could be seen
        time.sleep(0.1)


def _train(run: RunConfig) -> list[str]:
    """Begin a run or go on with it; the warnings that it gave.

    After a signal that reached a worker nothing else is begun there: some jobs wait in the pool's
    queue for it, where they can no longer be cancelled.
    """
    global _stop
    if _stop is not None:
        raise _stop
    try:
        with _working, warnings.catch_warnings(record=True) as caught:
            begin_or_go_on(run)
    except (Interrupted, KeyboardInterrupt) as stop:
        _stop = stop
        raise
    return list(dict.fromkeys(str(each.message) for each in caught))


def _train_in_processes(
    config: CompareConfig,
    left: Sequence[RunConfig],
    label: Callable[[RunConfig], str],
    tell: Callable[[str], None],
) -> None:
    spawn = multiprocessing.get_context("spawn")  # threads of PyTorch do not survive a fork
    asked = spawn.Event()
    about = (config.processes, config.out, asked)
    # SIGTERM is no exception here, as Ctrl-C is: it could come in the midst of starting a worker.
    with (
        first_signal(signal.SIGTERM, told=lambda _: asked.set()),
        ProcessPoolExecutor(
            config.processes, spawn, initializer=_begin_worker, initargs=about
        ) as pool,
    ):
        jobs = {pool.submit(_train, run): run for run in left}
        try:
            for number, job in enumerate(_ended(jobs), start=1):
                for text in job.result():
                    warnings.warn(text, stacklevel=2)
                run = jobs[job]
                top1 = read_rows(run.out / "metrics.csv")[-1]["top1"]
                tell(f"{label(run)}: top-1 {top1:.2f}%  ({number} of {len(left)})")
        except BrokenProcessPool as error:
            raise SenetError(
                "a process that trained was killed, perhaps for want of memory; to go on: senet "
                f"{config.COMMAND} --resume {config.out}"
            ) from error
        except BaseException:
            asked.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if asked.is_set():
        raise Interrupted(config.out)


def _ended(jobs: Iterable[Future[list[str]]]) -> Iterator[Future[list[str]]]:
    """Yield the jobs as they end, and hear signals meanwhile.

    One that another thread takes, or that comes just before the wait begins, does not end the wait:
    without a time limit it would be heard when the next job ends, perhaps hours later.
    """
    waiting = set(jobs)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from done


def make_folder(config: CompareConfig) -> None:
    """Make the folder of a comparison or an ablation with its config.toml.

    Raises:
        UserError: it exists, cannot be made, lies in what is read as data, or config.toml cannot
            hold an option.
    """
    check_outside(config.data, config.out)
    content = config.to_toml()
    try:
        config.out.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{config.out} exists and is never overwritten: give another --out, or go on with it "
            f"by senet {config.COMMAND} --resume {config.out}"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot make {config.out}: {error.strerror}; give a writable place by --out"
        ) from error
    atomic_write(config.out / RUN_CONFIG, content)


def finished(run: RunConfig) -> bool:
    """Whether a run has all its epochs."""
    return len(read_rows(run.out / "metrics.csv")) >= run.recipe.epochs


def gather(config: CompareConfig, data: ImageData, judged: Mapping[Path, Judgement]) -> Comparison:
    """Read the finished runs, and go over the validation images for confusions and gates.

    Args:
        config: the comparison.
        data: what it was trained on.
        judged: by folder, the last judgement of runs; the others are judged once more.
    """
    runs = config.runs()
    results: dict[str, NetworkResult] = {}
    gates: dict[str, NDArray[np.float64]] = {}
    gate = config.se_options.get("gate", "sigmoid")
    for kind, configs in runs.items():
        confusion = np.zeros((len(data.classes),) * 2, np.int64)
        for run in configs:
            checkpoint = open_checkpoint(run.out / "checkpoints" / "last")
            matrix, run_gates = examine(checkpoint, data, run, judged.get(run.out))
            confusion += matrix
            for name, values in run_gates.items():
                gates[name] = gates.get(name, 0) + values / config.seeds
        if config.foreign and kind == "se":
            gate = next(iter(excitations(checkpoint.model).values())).gate
        results[kind] = _network_result(configs, checkpoint, confusion)
    return Comparison(
        plain=results["plain"],
        se=results["se"],
        data=data.name,
        recipe=config.recipe,
        epochs=config.training_recipe().epochs,
        seeds=tuple(range(config.seeds)),
        validation_images=len(data.val),
        classes=data.classes,
        gates=gates,
        neutral_gate=neutral_gate(gate),
    )


def _network_result(
    configs: Sequence[RunConfig], checkpoint: Checkpoint, confusion: NDArray[np.int64]
) -> NetworkResult:
    histories = [read_rows(run.out / "metrics.csv") for run in configs]
    timings = [read_rows(run.out / "timings.csv") for run in configs]
    size = checkpoint.preprocessing.image_size
    model = checkpoint.model
    return NetworkResult(
        name=configs[0].label,
        parameters=count_parameters(model),
        multiply_adds=count_multiply_adds(model, (checkpoint.preprocessing.channels, size, size)),
        top1=tuple(rows[-1]["top1"] for rows in histories),
        top5=tuple(rows[-1]["top5"] for rows in histories),
        images_per_second=tuple(
            statistics.median(row["images_per_second"] for row in rows) for rows in timings
        ),
        seconds=tuple(
            sum(row["train_seconds"] + row["evaluation_seconds"] for row in rows)
            for rows in timings
        ),
        histories=tuple(histories),
        confusion=confusion,
    )
