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
    what: Literal["ops", "train"],
    /,
    *,
    rounds: Whole = 15,
    warmup: Whole = 3,
    batch_sizes: WholeNumbers = None,
    no_compile: Switch = False,
    only: str | None = None,
    no_memory: Switch = False,
    results: Path | None = None,
    no_tune_allocator: Switch = False,
) -> None:
    """Time senet against timm, torchvision and PyTorch, in turns in one process.

    Prints quantiles over the rounds, ratios to senet, and what they amount to.

    Args:
        what: 'ops' for the operators and a copy of the same map; 'train' for a training step of
            (SE-)ResNet-50 and its peak memory.
        rounds: measured rounds; each contestant has a turn in each.
        warmup: rounds before that.
        batch_sizes: images a training step, such as 8,16 (default: both); only with 'train'.
        no_compile: leave out the contestants that torch.compile makes, which takes minutes.
        only: leave out cases whose name does not contain this, such as 'tail' or 'alone 16x512'.
        no_memory: leave out the peak memory of 'train'.
        results: CSV file that the rows are added to.
        no_tune_allocator: leave glibc's memory allocator as it is, for all contestants.
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    from senet import benchmark, benchmark_ops, benchmark_train

    benchmark.check_rounds(rounds, warmup)
    if batch_sizes is not None and what != "train":
        raise UserError("--batch-sizes is an option of 'train'; 'ops' has fixed shapes")
    if no_memory and what != "train":
        raise UserError("--no-memory is an option of 'train'; 'ops' measures times only")
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
        cases = benchmark_ops.cases(compiled=not no_compile)
    else:
        cases = benchmark_train.cases(sizes, compiled=not no_compile)
    cases = benchmark.chosen(cases, only)
    memory_sizes = sizes if what == "train" and not no_memory else ()
    steps = len(memory_sizes) * (len(benchmark_train.NETWORKS) - 1)
    with _steps_bar(len(cases) + steps) as advance:
        for size in memory_sizes:
            tuned = not no_tune_allocator
            record(benchmark_train.measure_memory(size, tuned=tuned, advance=advance))
        for measured in benchmark.run_cases(cases, rounds=rounds, warmup=warmup, advance=advance):
            record(measured)
    print_table(benchmark.results_table(found))
    conclude = benchmark_ops.conclusions if what == "ops" else benchmark_train.conclusions
    for line in conclude(found):
        print(line)
