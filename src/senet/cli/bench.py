"""`senet bench`: our speed against the peers', on this machine."""

import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import Progress

from senet.errors import UserError
from senet.units import print_table

from .options import Switch, Whole, WholeNumbers, prepare_process

if TYPE_CHECKING:
    from senet.benchmark import Measurement


@contextmanager
def _steps_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each of `total` steps as it begins."""
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        steps = itertools.count()

        def advance(name: str) -> None:
            bar.update(task, completed=next(steps), description=name)

        yield advance


def bench(
    what: Literal["ops", "train", "inference"],
    /,
    *,
    rounds: Whole = 15,
    warmup: Whole = 3,
    batch_sizes: WholeNumbers = None,
    no_compile: Switch = False,
    results: Path | None = None,
    no_tune_allocator: Switch = False,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Time senet against timm, torchvision and PyTorch, in turns in one process.

    Prints quantiles over the rounds, ratios to senet, and what they amount to.

    Args:
        what: 'ops' for the operators and a copy of the same map; 'train' for a training step of
            (SE-)ResNet-50 and its peak memory; 'inference' for senet.optimize (on a GPU only:
            --device cuda).
        rounds: measured rounds; each contestant has a turn in each.
        warmup: rounds before that.
        batch_sizes: images a training step, such as 8,16 (default: both); only with 'train'.
        no_compile: leave out the contestants that torch.compile makes, which takes minutes.
        results: CSV file that the rows are added to.
        no_tune_allocator: leave glibc's memory allocator as it is, for all contestants.
        device: cuda times on the GPU, by its own clock, in bfloat16 and TF32.
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    if device == "cuda":
        _bench_gpu(what, rounds, warmup, batch_sizes, not no_compile, results)
        return
    if what == "inference":
        raise UserError(
            "'inference' is timed with --device cuda; benchmarks/inference.py is for the CPU"
        )
    from senet import benchmark, benchmark_ops, benchmark_train

    benchmark.check_rounds(rounds, warmup)
    if batch_sizes is not None and what != "train":
        raise UserError("--batch-sizes is an option of 'train'; 'ops' has fixed shapes")
    if batch_sizes is not None and min(batch_sizes) < 2:
        raise UserError(f"--batch-sizes must be at least 2, got {batch_sizes}")
    allocator = "untuned" if no_tune_allocator else "tuned"
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found: list[Measurement] = []

    def record(measurements: "Sequence[Measurement]") -> None:
        if results is not None:
            where = benchmark.environment(command, allocator)
            benchmark.append_results(results, measurements, where)
        found.extend(measurements)

    sizes = batch_sizes or benchmark_train.BATCH_SIZES
    if what == "ops":
        cases, steps = benchmark_ops.cases(compiled=not no_compile), 0
    else:
        cases = benchmark_train.cases(sizes, compiled=not no_compile)
        steps = len(sizes) * (len(benchmark_train.NETWORKS) - 1)
    with _steps_bar(len(cases) + steps) as advance:
        for size in sizes if what == "train" else ():
            tuned = not no_tune_allocator
            record(benchmark_train.measure_memory(size, tuned=tuned, advance=advance))
        for measured in benchmark.run_cases(cases, rounds=rounds, warmup=warmup, advance=advance):
            record(measured)
    print_table(benchmark.results_table(found))
    conclude = benchmark_ops.conclusions if what == "ops" else benchmark_train.conclusions
    for line in conclude(found):
        print(line)


def _bench_gpu(
    what: Literal["ops", "train", "inference"],
    rounds: int,
    warmup: int,
    batch_sizes: tuple[int, ...] | None,
    compiled: bool,
    results: Path | None,
) -> None:
    """`senet bench --device cuda`."""
    from senet import benchmark, benchmark_gpu

    benchmark.check_rounds(rounds, warmup)
    benchmark_gpu.check_device("cuda")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    cases = benchmark_gpu.cases(what, "cuda", batch_sizes, compiled=compiled)
    found: list[Measurement] = []
    with _steps_bar(len(cases)) as advance:
        for case in cases:
            advance(f"{case.benchmark} {case.name}")
            measured = benchmark_gpu.measure(case, "cuda", rounds=rounds, warmup=warmup)
            if results is not None:
                where = benchmark.environment(command, "PyTorch's on the GPU", "cuda")
                benchmark.append_results(results, measured, where)
            found += measured
    print_table(benchmark.results_table(found))
    for line in benchmark_gpu.conclusions(found):
        print(line)
