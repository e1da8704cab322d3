"""The training loop, from a configuration to a run folder, and on from any checkpoint of it."""

import errno
import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter

from senet.data import DATA_SETS, ImageStream, absolute_data
from senet.data.load import check_outside
from senet.errors import SenetError, UserError
from senet.support.files import atomic_folder, atomic_write
from senet.support.places import check_new_folder
from senet.support.progress import Progress, Silent
from senet.support.signals import first_signal
from senet.support.trust import check_trusted
from senet.tasks.task import Judgement, Objective
from senet.training.config import RUN_CONFIG, RunConfig, flatten, placed
from senet.training.evaluation import Stopped
from senet.training.machine import environment
from senet.training.material import Material, named_material
from senet.training.ranks import RankLog, RankProgress, Watchdog, locked, rank
from senet.training.session import Position, Session, Step
from senet.training.state import load_training_state, recorded_preprocessing, save_training_state

__all__ = ["Interrupted", "RunResult", "resume", "train"]


class Interrupted(SenetError):  # noqa: N818 - not an error: the answer to a signal
    """A run was stopped by SIGINT (Ctrl-C) or SIGTERM, after it wrote a checkpoint.

    Attributes:
        run: its folder.
        number: the signal; SIGTERM in a process that stops because another one was told to.
    """

    def __init__(self, run: Path, number: int = signal.SIGTERM) -> None:
        super().__init__(f"stopped; to go on exactly here: senet train --resume {run}")
        self.run = run
        self.number = number

    def __reduce__(self) -> tuple[type[Self], tuple[Path, int]]:
        return type(self), (self.run, self.number)  # as it is, to the process that asked for it


@dataclass(frozen=True)
class RunResult:
    """What a finished run gave.

    Attributes:
        run: its folder.
        history: rows of metrics.csv; `lr` is the learning rate that the epoch ended with.
        best: row of metrics.csv of the best epoch, the first of equal ones.
        judged: column that tells which is best: "top1" (%) for classes, "mean_ap" (%) for
            labels, "r2" for numbers.
        evaluation: of the last epoch; an `Evaluation` for classes, a `LabelEvaluation` or a
            `NumberEvaluation`.
        task: what was trained.
        images_per_second: training speed, median over the epochs.
        seconds: training and evaluation, over all parts of a run that was resumed.
    """

    run: Path
    history: tuple[dict[str, float], ...]
    best: Mapping[str, float]
    judged: str
    evaluation: Judgement
    task: Objective
    images_per_second: float
    seconds: float

    @property
    def best_epoch(self) -> int:
        """Number of the best epoch, from 1."""
        return int(self.best["epoch"])

    @property
    def best_top1(self) -> float:
        """Highest top-1 of its epochs, %; of classes only."""
        return self.best["top1"]

    def best_told(self) -> str:
        """What the best epoch is best in, and how good it is."""
        return f"{self.task.heading} {self.task.score(self.best[self.judged])}"


def train(
    config: RunConfig,
    *,
    progress: Progress | None = None,
    make: Callable[[RunConfig, Accelerator], Material] = named_material,
) -> RunResult:
    """Train a network; `config.out` becomes the run folder.

    Seeds and uses the global random generators of Python, NumPy and PyTorch. SIGINT and SIGTERM
    stop it after the step at hand, with a checkpoint; a second one stops at once.

    Args:
        config: the run.
        progress: hears of each step and epoch.
        make: gives network and data, by default those that the configuration names.

    Raises:
        UserError: a bad option, data that do not fit, or a run folder that exists or cannot be
            made; nothing was written.
        SenetError: the loss is not finite, or the disk is full; the last good checkpoint is kept.
        Interrupted: a signal came.
    """
    check_new_folder(
        config.out,
        "run folder",
        f"give another one by --out, or go on with it by senet train --resume {config.out}",
    )
    check_outside(config.data, config.out)
    config = config.in_place()
    session = Session(config, make)
    with ExitStack() as held:
        if session.accelerator.is_main_process:
            _make_folder(session.config)
            held.enter_context(locked(config.out))
        session.accelerator.wait_for_everyone()
        return _fit(session, None, progress or Silent())


def resume(
    run: str | PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    make: Callable[[RunConfig, Accelerator], Material] | None = None,
) -> RunResult:
    """Go on with a run that was stopped in any way, exactly as if it had not been.

    On the CPU, with as many threads and one or two processes, weights and metrics.csv end up
    bit-identical. With another number of processes than before it goes on with the same images in
    each step; batch statistics, dropout and the order of sums differ, and a note says so.

    Args:
        run: the run folder.
        options: options of `RunConfig`, `Recipe` or the network that a user gave once more;
            `parallel` may be another than the run's own, and `data` where its images lie now.
        machine: fields of `RunConfig` that change no result (`MACHINE`) and are others from now on.
        progress: see `train`.
        make: see `train`.

    Raises:
        UserError: it is no run folder, another process works on it, an option differs from
            the run's, or its network is of a file that this user never named.
        SenetError: as `train`, or no checkpoint is intact.
    """
    run = Path(run)
    if not (run / RUN_CONFIG).is_file():
        raise UserError(f"{run} is no run folder: it has no {RUN_CONFIG}; start a run with --out")
    given = dict(options or {})
    config = replace(RunConfig.from_toml(run / RUN_CONFIG, out=run), **(machine or {}))
    config = replace(config, parallel=given.pop("parallel", config.parallel))
    before = config.data
    config = _moved(config, given)
    _refuse_changes(config, given)
    if make is None:  # a stranger's folder may name a stranger's program
        check_trusted(config.model, named_by=None if "model" in given else str(run / RUN_CONFIG))
    # Taken before the processes meet: if it is refused, the launcher ends those that wait.
    with locked(run) if rank() == 0 else nullcontext():
        return _resume(config, progress or Silent(), moved=config.data != before, make=make)


def _moved(config: RunConfig, given: dict[str, Any]) -> RunConfig:
    """The run with its data where the user says that they are now, taken out of `given`."""
    if "data_root" in given:
        config = replace(config, data_root=os.path.abspath(given.pop("data_root")))  # noqa: PTH100
    if "data" in given and not {given["data"], config.data} & set(DATA_SETS):
        config = replace(config, data=absolute_data(given.pop("data")))
    return config


def _resume(
    config: RunConfig,
    progress: Progress,
    *,
    moved: bool,
    make: Callable[[RunConfig, Accelerator], Material] | None = None,
) -> RunResult:
    """Go on; `moved`: config.toml names the place where the data were before."""
    run = config.out
    before = recorded_preprocessing(run)
    session = Session(config, make or partial(named_material, preprocessing=before))
    with session.accelerator.main_process_first():  # it moves a corrupt checkpoint away
        state = load_training_state(run)
    if state is not None:
        # Read as a configuration: runs from before an option had its default.
        was = flatten(RunConfig.from_dict(state["options"], out=run).result_options())
        now = flatten(config.result_options())
        if not {was["data"], now["data"]} & set(DATA_SETS):  # a place; what is there is compared
            was["data"] = now["data"]
        changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        if changed:
            raise UserError(
                f"{run / RUN_CONFIG} was changed since the run began ({', '.join(changed)}); "
                "restore it, or start a new run from it: "
                f"senet train --config {run / RUN_CONFIG} --out NEW_FOLDER"
            )
    if moved and session.accelerator.is_main_process:
        if state is not None:
            session.check_data(state)
        place = {"data": config.data, "data_root": config.data_root}
        RunConfig.from_toml(run / RUN_CONFIG, **place).to_toml(run / RUN_CONFIG)
    return _fit(session, state, progress)


def _fit(session: Session, state: dict[str, Any] | None, progress: Progress) -> RunResult:
    """The loop itself; `state` is that of a checkpoint, or None at the start."""
    accelerator, run = session.accelerator, session.config.out
    number = accelerator.process_index
    log = RankLog(run, number) if accelerator.num_processes > 1 else None
    try:
        with (
            _stop_signals() as stopped,
            _board(session, state) as board,
            Watchdog(run, number, session.config.timeout) as watchdog,
        ):
            heard = progress if accelerator.is_main_process else Silent()
            told = RankProgress(heard, log, watchdog.beat)
            told.hello(number, accelerator.num_processes, str(accelerator.device))
            return _epochs(session, state, told, stopped, board)
    except BaseException as error:
        if log:
            log.write(f"ends with {type(error).__name__}: {error}")
        if not isinstance(error, OSError):
            raise
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SenetError(
            f"{session.config.out}: {error.strerror}; the last checkpoint is intact: free some "
            f"space, then senet train --resume {session.config.out}"
        ) from error


def _epochs(
    session: Session,
    state: dict[str, Any] | None,
    progress: Progress,
    stopped: "StopRequest",
    board: SummaryWriter | None,
) -> RunResult:
    run, recipe = session.config.out, session.config.recipe
    main, steps = session.accelerator.is_main_process, session.steps_per_epoch
    several = session.accelerator.num_processes > 1
    at = session.restore(state) if state else Position()
    _tell(session, state, progress)
    evaluation: Judgement | None = None

    begun: deque[Step] = deque()

    def hear(steps_left: int = 0) -> bool:
        """Tell the losses of the steps that were begun, but of the last ones.

        Returns:
            Whether another process was asked to stop.
        """
        asked = False
        while len(begun) > steps_left:
            each = begun.popleft()
            loss, stop = session.finished(each)
            asked = asked or stop
            progress.step(recipe.batch_size, loss, each.lr)
            if board:
                board.add_scalar("step/loss", loss, each.number)
                board.add_scalar("step/lr", each.lr, each.number)
        return asked

    def save(*slots: str) -> None:
        hear()  # weights behind a loss that is not finite are never written
        content = session.state(at)
        for slot in slots if main else ():
            weights = session.judged_weights(content)
            about = session.description(at, evaluation)
            save_training_state(run, slot, weights, about, content)  # type: ignore[arg-type]

    def stop_here() -> Interrupted:
        save("last")
        return Interrupted(run, stopped.number)

    if state and main:
        _write_tables(run, at)  # a kill may have come between the checkpoint and these
    while at.epoch < recipe.epochs and not session.exhausted(at.history):
        progress.begin_epoch(at.epoch + 1, recipe.epochs, steps, at.done)
        batches = session.batches(at.epoch) if at.done < steps else iter(())
        if state:
            session.restore_random(state)
            state = None
        began = time.perf_counter() - at.seconds
        for images, targets in batches:
            asked = stopped.requested
            begun.append(session.train_step(images, targets, at.step + 1, stop=asked))
            at.done, at.step = at.done + 1, at.step + 1
            others = hear(1)  # of the step before, while the device works on this one
            at.seconds = time.perf_counter() - began
            # Of several processes all hear of it after the same step.
            if others if several else stopped.requested:
                raise stop_here()
            every = session.config.checkpoint_steps
            if every and at.step % every == 0 and at.done < steps:
                save("last")
        others = hear()
        at.seconds = time.perf_counter() - began
        if others:
            raise stop_here()

        evaluated = time.perf_counter()
        try:
            evaluation = session.evaluate(progress, lambda: stopped.requested)
        except Stopped:
            raise stop_here() from None
        if not math.isfinite(evaluation.loss):
            raise session.diverged(f"validation loss is {evaluation.loss}", at.step)
        row = {
            "epoch": at.epoch + 1,
            "step": at.step,
            "lr": session.lr,
            **{name: float(meter.compute()) for name, meter in session.meters.items()},
            **evaluation.row(),
        }
        if "train_top1" in row:
            row["train_top1"] *= 100
        better = session.better(row, at.history)
        at.history.append(row)
        at.timings.append(
            {
                "epoch": at.epoch + 1,
                "train_seconds": at.seconds,
                "evaluation_seconds": time.perf_counter() - evaluated,
                "images_per_second": steps * recipe.batch_size / at.seconds,
            }
        )
        at.epoch, at.done, at.seconds = at.epoch + 1, 0, 0.0
        session.new_epoch()
        if board:
            for name in row.keys() - {"epoch", "step", "lr"}:
                board.add_scalar(f"epoch/{name}", row[name], at.step)
            board.flush()
        # "best" first: a kill in between repeats the epoch, and with it this.
        save(*(("best", "last") if better else ("last",)))
        if main:
            _write_tables(run, at)
        progress.end_epoch(row)
        if at.epoch < recipe.epochs and session.anywhere(stopped.requested):
            raise Interrupted(run, stopped.number)

    best = at.history[session.best(at.history)]
    if at.epoch < recipe.epochs:
        progress.note(
            f"ended after epoch {at.epoch} of {recipe.epochs}: {recipe.patience} epochs in a row "
            f"were no better than epoch {best['epoch']:.0f} (patience)"
        )
    return RunResult(
        run=run,
        history=tuple(at.history),
        best=best,
        judged=session.task.judged,
        evaluation=evaluation or session.evaluate(progress, lambda: False),
        task=session.task,
        images_per_second=statistics.median(row["images_per_second"] for row in at.timings),
        seconds=sum(row["train_seconds"] + row["evaluation_seconds"] for row in at.timings),
    )


def _tell(session: Session, state: dict[str, Any] | None, progress: Progress) -> None:
    for note in session.material.notes:
        progress.note(note)
    if (before := session.processes_before) is not None:
        # A stream may share out its files anew.
        streamed = session.data is not None and isinstance(session.data.train, ImageStream)
        progress.note(
            f"the run was made by {before} processes, now {session.accelerator.num_processes}: "
            f"{'' if streamed else 'each step takes the same images, but '}batch statistics, "
            "dropout, mixing and the order of sums differ, so that its results differ from those "
            "of an uninterrupted run"
        )
    was, now = (state or {}).get("environment", {}), environment(session.config)
    changed = [f"{key} {value}, now {now[key]}" for key, value in was.items() if value != now[key]]
    if changed:
        progress.note(
            f"the run began with {'; '.join(changed)}: its results may differ from those of an "
            "uninterrupted run in the last digits"
        )


def _write_tables(run: Path, at: Position) -> None:
    atomic_write(run / "metrics.csv", _csv(at.history))
    atomic_write(run / "timings.csv", _csv(at.timings))


def _csv(rows: Sequence[Mapping[str, float]]) -> str:
    # repr gives every digit of a float, so that equal files mean equal numbers.
    lines = [",".join(rows[0])] if rows else []
    lines += [",".join(repr(value) for value in row.values()) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def _make_folder(config: RunConfig) -> None:
    """Make the run folder with its config.toml in it, both or neither."""
    try:
        with atomic_folder(config.out) as folder:
            config.to_toml(folder / RUN_CONFIG)
            for name in ("checkpoints", "figures", "tensorboard"):
                (folder / name).mkdir()
    except OSError as error:
        raise UserError(
            f"cannot make run folder {config.out}: {error.strerror}; give a writable place by --out"
        ) from error


def _refuse_changes(config: RunConfig, options: Mapping[str, Any]) -> None:
    flat = flatten(config.to_dict())
    known = {key.rsplit(".", 1)[-1]: value for key, value in flat.items()}
    known["recipe"] = config.recipe.name
    known["out"] = os.path.abspath(config.out)  # noqa: PTH100 - links stay links
    for name, given in placed(options).items():
        had = known.get(name)
        plain = os.path.abspath(given) if isinstance(given, Path) else given  # noqa: PTH100
        plain = list(plain) if isinstance(plain, tuple) else plain
        if plain != had and name == "epochs":
            raise UserError(
                f"--resume goes on with the run's own options, and its {had} epochs are what its "
                "learning rate was planned for; to train its network further, start a new run from "
                f"its weights: senet train --init {config.out} --data {config.data} "
                f"--recipe {config.recipe.name} --epochs N --out NEW_FOLDER"
            )
        if plain != had:
            raise UserError(
                f"--resume goes on with the run's own options, but {name} is {_said(had)} there "
                f"and {_said(plain)} here; leave it out, or start a new run from the old one: "
                f"senet train --config {config.out / RUN_CONFIG} --out NEW_FOLDER and that option"
            )


def _said(value: Any) -> str:
    """An option's value as a user would write it."""
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else repr(value)


class StopRequest:
    """Whether a signal asked the run to stop."""

    requested = False
    number: int = signal.SIGTERM


# Of the runs at hand in this process.
_requests: list[StopRequest] = []


def stop_runs() -> None:
    """Ask the runs at hand in this process to stop, as SIGTERM would; they write a checkpoint."""
    for request in _requests:
        request.requested = True


@contextmanager
def _stop_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as it did before."""
    request = StopRequest()

    def ask(number: int) -> None:
        request.requested, request.number = True, number

    _requests.append(request)
    try:
        with first_signal(signal.SIGINT, signal.SIGTERM, told=ask):
            yield request
    finally:
        _requests.remove(request)


def _board(session: Session, state: dict[str, Any] | None) -> Any:
    """TensorBoard's writer, in the main process; steps that will be repeated are purged."""
    if not session.accelerator.is_main_process:
        return nullcontext(None)
    step = state["position"]["step"] if state else 0
    folder = session.config.out / "tensorboard"
    return SummaryWriter(str(folder), purge_step=step + 1 if state else None)
