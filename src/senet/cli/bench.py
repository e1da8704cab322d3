"""`senet bench`: our speed against the peers', on this machine."""

import copy
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table

from senet.cli.options import Names, Switch, Whole, WholeNumbers, prepare_process
from senet.cli.tables import new_table, print_table
from senet.errors import UserError
from senet.support.console import PlainColumn, PlainConsole

if TYPE_CHECKING:
    from torch import nn

    from senet.bench.setting import Setting
    from senet.bench.timing import Case, Measurement


@contextmanager
def _steps_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each of `total` steps as it begins."""
    console = PlainConsole(stderr=True)
    columns = (
        PlainColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, transient=True, console=console, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        steps = itertools.count()

        def advance(name: str) -> None:
            bar.update(task, completed=next(steps), description=name)

        yield advance


def bench(
    what: Literal["ops", "convolutions", "train", "inference", "data"],
    /,
    *,
    models: Annotated[Names, Parameter(name=("--models", "--model"))] = None,
    rounds: Whole = 15,
    warmup: Whole = 3,
    batch_sizes: Annotated[WholeNumbers, Parameter(name=("--batch-sizes", "--batch-size"))] = None,
    images: Path | None = None,
    workers: WholeNumbers = None,
    no_compile: Switch = False,
    only: str | None = None,
    no_memory: Switch = False,
    results: Path | None = None,
    no_tune_allocator: Switch = False,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Time senet against timm, torchvision and PyTorch, in turns in one process.

    Prints quantiles over the rounds, ratios to senet, and what they amount to.

    Args:
        what: 'ops' for the operators and a copy of the same map; 'convolutions' for each pass of a
            training step's convolutions; 'train' for a training step of (SE-)ResNet-50 and its
            peak memory; 'inference' for senet.optimize and senet.export against timm,
            torch.compile, ONNX Runtime and OpenVINO; 'data' for decoding and augmenting JPEG files
            with each decoder, by loader workers.
        models: with 'inference' what to run, with commas between them (default: se_resnet50):
            networks with SE, run folders or checkpoints of yours, 'torchvision:NAME', 'timm:NAME'
            or 'FILE.py:FUNCTION'; the network without SE runs too where it is known. With 'train'
            networks of the last three kinds as they are, compiled, through senet.fuse, and so
            without their SE.
        rounds: measured rounds; each contestant has a turn in each.
        warmup: rounds before that.
        batch_sizes: images at a time, such as 8,16 (default: both for 'train', 1,16 for
            'inference'); with no other.
        images: with 'data': folder of JPEG files, of which up to 192 are used (default: 192
            synthetic ones of 500×375 pixels).
        workers: with 'data': numbers of loader workers (default: 0,1,2; 0 is the process itself).
        no_compile: leave out the contestants that torch.compile makes, which takes minutes.
        only: leave out cases whose name does not contain this, such as 'tail' or 'alone 16x512'.
        no_memory: leave out the peak memory of 'train'.
        results: CSV file that the rows are added to.
        no_tune_allocator: leave glibc's memory allocator as it is, for all contestants.
        device: cuda times on the GPU, by its own clock, in bfloat16 and TF32.
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    if models is not None and what not in ("inference", "train"):
        raise UserError(f"--models is an option of 'inference' and 'train', not of {what!r}")
    if what != "data":
        for flag, value in (("images", images), ("workers", workers)):
            if value is not None:
                raise UserError(f"--{flag} is an option of 'data', not of {what!r}")
    if no_memory and what != "train":
        raise UserError(f"--no-memory is an option of 'train', not of {what!r}")
    if what in ("data", "convolutions") and no_compile:
        raise UserError(f"--no-compile is for networks and operators, not for {what!r}")
    if device == "cuda":
        if what == "data":
            raise UserError("images are decoded on the CPU: leave out --device cuda")
        if what == "convolutions":
            raise UserError("'convolutions' compares kernels of the CPU: leave out --device cuda")
        for flag, given in (("models", models), ("only", only), ("no-memory", no_memory or None)):
            if given is not None:
                raise UserError(f"--{flag} is for the CPU; --device cuda measures fixed cases")
    from senet.bench import timing
    from senet.bench.setting import SETTINGS, check_device

    timing.check_rounds(rounds, warmup)
    if batch_sizes is not None and what not in ("train", "inference"):
        raise UserError(f"--batch-sizes is an option of 'train' and 'inference'; {what!r} has none")
    check_device(device)
    if results is not None:
        timing.check_results(results)
    allocator = "untuned" if no_tune_allocator else "tuned"
    if device == "cuda":
        allocator = "PyTorch's on the GPU"
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found: list[Measurement] = []

    def record(measurements: "Sequence[Measurement]") -> None:
        if results is not None:
            where = timing.environment(command, allocator, device)
            timing.append_results(results, measurements, where)
        found.extend(measurements)

    with ExitStack() as held:
        if what == "data":
            plan = _data_plan(images, workers, held)
        elif device == "cuda":
            plan = _gpu_plan(what, batch_sizes, SETTINGS[device], compiled=not no_compile)
        else:
            plan = _plan(what, models, batch_sizes, SETTINGS[device], compiled=not no_compile)
        cases = timing.chosen(plan.cases, only)
        memory_sizes = () if no_memory else plan.memory_sizes
        steps = len(memory_sizes) * plan.memory_networks
        advance = held.enter_context(_steps_bar(len(cases) + steps))
        for model, size in itertools.product(plan.memory_models, memory_sizes):
            from senet.bench import train as bench_train

            tuned = not no_tune_allocator
            record(bench_train.measure_memory(size, tuned=tuned, advance=advance, model=model))
        for measured in timing.run_cases(cases, rounds=rounds, warmup=warmup, advance=advance):
            record(measured)
    print_table(results_table(found))
    for line in plan.conclude(found):
        print(line)


def results_table(measurements: "Sequence[Measurement]") -> Table:
    """Rows of cases and contestants with quantiles and ratios to ours."""
    right = ("20%", "median", "80%", "unit", "× ours")
    table = new_table("benchmark", "case", "contestant", right=right)
    last: tuple[str, str] = ("", "")
    for m in measurements:
        if last not in (("", ""), (m.benchmark, m.case)):
            table.add_section()
        first = (m.benchmark, m.case) != last
        last = (m.benchmark, m.case)
        table.add_row(
            *(last if first else ("", "")),
            m.contestant,
            *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in m.quantiles),
            m.unit,
            f"{m.ratio:.2f}",
        )
    return table


@dataclass(frozen=True)
class _Plan:
    """What a benchmark measures, and what it says of the result."""

    cases: "Sequence[Case]"
    conclude: "Callable[[Sequence[Measurement]], list[str]]"
    memory_sizes: Sequence[int] = ()  # batches whose peak memory is measured first
    memory_networks: int = 0  # how many networks that is for each batch
    memory_models: Sequence[str | None] = (None,)  # whose forms they are, see bench/train.py


def _data_plan(images: Path | None, workers: Sequence[int] | None, held: ExitStack) -> _Plan:
    """The cases of 'data'; synthetic images are kept until `held` is closed."""
    from senet.bench import data as bench_data
    from senet.data import check_decoder

    check_decoder("turbo")
    if images is None:
        folder = Path(held.enter_context(TemporaryDirectory(prefix="senet-bench-")))
        paths = bench_data.write_pictures(folder)
    else:
        paths = bench_data.find_jpegs(images)
    cases = bench_data.cases(paths, workers or bench_data.WORKERS)
    about = bench_data.describe(paths)
    return _Plan(cases, lambda found: [about, *bench_data.conclusions(found)])


def _plan(
    what: str,
    models: Sequence[str] | None,
    batch_sizes: Sequence[int] | None,
    settings: "Sequence[Setting]",
    *,
    compiled: bool,
) -> _Plan:
    if what == "ops":
        from senet.bench import ops as bench_ops

        return _Plan(bench_ops.cases(settings, compiled=compiled), bench_ops.conclusions)
    if what == "convolutions":
        from senet.bench import convolutions as bench_convolutions

        return _Plan(bench_convolutions.cases(), bench_convolutions.conclusions)
    if what == "train":
        from senet.bench import train as bench_train

        sizes = batch_sizes or bench_train.BATCH_SIZES["cpu"]
        if models is not None:
            from senet.bench.networks import entrants_of

            forms = sum(len(entrants_of(name, compiled=False)) for name in models)
            return _Plan(
                bench_train.cases_of(models, sizes, compiled=compiled),
                bench_train.conclusions_of_models,
                sizes,
                forms,
                models,
            )
        return _Plan(
            bench_train.cases(batch_sizes, settings, compiled=compiled),
            bench_train.conclusions,
            sizes,
            len(bench_train.MEASURED),
        )
    from senet.bench import inference as bench_inference

    engines = [
        engine
        for engine in bench_inference.ENGINES
        if compiled or engine != bench_inference.COMPILED
    ]
    models = models or ("se_resnet50",)
    opened = {name: _open_model(name) for name in models}  # a wrong name is told before all work
    cases = bench_inference.cases(
        models,
        batch_sizes or bench_inference.BATCH_SIZES["cpu"],
        engines=engines,
        open_model=lambda name: copy.deepcopy(opened[name]),
    )
    return _Plan(cases, bench_inference.conclusions)


def _gpu_plan(
    what: str, batch_sizes: Sequence[int] | None, settings: "Sequence[Setting]", *, compiled: bool
) -> _Plan:
    if what == "ops":
        from senet.bench import ops as bench_ops

        return _Plan(bench_ops.cases(settings, compiled=compiled), bench_ops.conclusions_of_tails)
    from senet.bench.inference import network_cases
    from senet.bench.timing import compared
    from senet.bench.train import cases as training_cases

    make = training_cases if what == "train" else network_cases
    return _Plan(make(batch_sizes, settings, compiled=compiled), compared)


def _open_model(name: str) -> "nn.Module":
    """A network of the user's, or of a name."""
    if Path(name).exists():
        from senet.checkpoint.files import open_checkpoint

        checkpoint = open_checkpoint(Path(name))
        found = checkpoint.preprocessing  # its images, which may be others than the network's own
        checkpoint.model.input_size = (found.channels, found.image_size, found.image_size)
        return checkpoint.model
    from senet.networks.anywhere import open_source

    return open_source(name)
