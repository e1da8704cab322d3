"""Fair timing: contestants alternate in one process, and every row says where it was measured.

What is compared is in the files beside this one, which times and records. The first contestant of
a case is ours, and ratios are to it.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from senet import ops
from senet.bench.setting import ON_CPU, Setting, peak_memory
from senet.errors import UserError
from senet.support.files import atomic_write
from senet.support.places import check_file

# Calls shorter than this are repeated within a round, so that the clock and a stray interrupt weigh
# little.
_ROUND_SECONDS = 0.02
# Before each turn on a CPU: an engine's threads look for work for a while after a call, on cores
# that the next contestant needs. (Without it MobileNetV3 at batch 1 took twice its time behind
# OpenVINO.)
_PAUSE = 0.05
_QUANTILES = (0.2, 0.5, 0.8)

COLUMNS = (
    "date", "command", "benchmark", "case", "contestant", "unit", "q20", "q50", "q80", "ratio",
    "rounds", "threads", "isa", "cpu", "load", "allocator", "torch", "torchvision", "timm",
    "senet", "python",
)  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a case.

    Attributes:
        name: as it is shown.
        run: does the work once.
        yardstick: whether it is no peer but a bound, whose memory says nothing.
    """

    name: str
    run: Callable[[], object]
    yardstick: bool = False


@dataclass(frozen=True)
class Case:
    """Work that contestants do.

    Attributes:
        benchmark: the claim it belongs to, such as "tail".
        name: the shape or batch, such as "16×256×56×56".
        build: makes the contestants, ours first; called when the case's turn comes.
        at: where and how precisely they run.
        unit: what a value is called.
        divisor: how many units of work a call does; values are a call's milliseconds over it.
        memory: whether its peak memory is measured too, on a GPU; what a CUDA graph holds does not
            count as a call's.
    """

    benchmark: str
    name: str
    build: Callable[[], Sequence[Contestant]]
    at: Setting = ON_CPU
    unit: str = "ms"
    divisor: float = 1.0
    memory: bool = True


@dataclass(frozen=True)
class Measurement:
    """What one contestant needed in one case.

    Attributes:
        benchmark, case, contestant: names, as in `Case` and `Contestant`.
        unit: "ms" a call, "ms/image" or "MiB".
        quantiles: 20, 50 and 80% over the rounds.
        ratio: median over the rounds of this contestant's value over that of ours in the same
            round; above 1 ours is better.
        rounds: how many values there were.
        least: the smallest of them.
    """

    benchmark: str
    case: str
    contestant: str
    unit: str
    quantiles: tuple[float, float, float]
    ratio: float
    rounds: int
    least: float


def chosen(cases: Sequence[Case], only: str | None) -> list[Case]:
    """The cases whose benchmark and name contain `only` (`x` matches `×`); all for None.

    Raises:
        UserError: there is none.
    """
    names = [f"{case.benchmark} {case.name}" for case in cases]
    wanted = (only or "").replace("×", "x")
    found = [c for c, name in zip(cases, names, strict=True) if wanted in name.replace("×", "x")]
    if not found:
        raise UserError(f"--only {only!r} matches no case; there are: {', '.join(names)}")
    return found


def check_rounds(rounds: int, warmup: int) -> None:
    """Raise UserError unless there is something to measure."""
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {rounds}")
    if warmup < 1:
        raise UserError(f"--warmup must be at least 1 (it compiles and allocates), got {warmup}")


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20, 50 and 80% quantiles, linearly interpolated."""
    ordered = sorted(values)
    found = []
    for share in _QUANTILES:
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = math.ceil(position)
        found.append(ordered[low] + (ordered[high] - ordered[low]) * (position - low))
    return found[0], found[1], found[2]


def summarize(
    benchmark: str, case: str, unit: str, values: Mapping[str, Sequence[float]]
) -> list[Measurement]:
    """Measurements of contestants from their values in each round; the first one is ours."""
    ours = next(iter(values.values()))
    return [
        Measurement(
            benchmark,
            case,
            name,
            unit,
            quantiles(theirs),
            statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
            len(theirs),
            min(theirs),
        )
        for name, theirs in values.items()
    ]


def measure(case: Case, *, rounds: int, warmup: int) -> list[Measurement]:
    """Time the contestants of a case in turns, with a pause before each: A B C, A B C, …

    Whatever else the machine does then hits all of them alike, and the ratios of a round hold on
    a loaded machine too.

    Args:
        case: what to time.
        rounds: how often each contestant's turn comes.
        warmup: rounds before that are not counted.

    Returns:
        A measurement a contestant, in milliseconds a call (over the case's divisor); on a GPU
        another of its peak memory in MiB.
    """
    with case.at.products():
        contestants = case.build()
        values = _turns(case, contestants, rounds, warmup)
        found = summarize(case.benchmark, case.name, case.unit, values)
        if case.at.device == "cuda" and case.memory:
            memory = {c.name: (peak_memory(c.run),) for c in contestants if not c.yardstick}
            found += summarize(f"{case.benchmark}, peak memory", case.name, "MiB", memory)
        if case.at.device == "cuda":
            del contestants
            torch.cuda.empty_cache()
    return found


def _turns(
    case: Case, contestants: Sequence[Contestant], rounds: int, warmup: int
) -> dict[str, list[float]]:
    repeats = {}
    for contestant in contestants:
        for _ in range(warmup):
            seconds = case.at.seconds(contestant.run, 1)
        repeats[contestant.name] = max(1, math.ceil(_ROUND_SECONDS / seconds))
    values: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            count = repeats[contestant.name]
            if case.at.device == "cpu":
                time.sleep(_PAUSE)
                if count > 1:  # short calls would feel the waking up
                    contestant.run()
            seconds = case.at.seconds(contestant.run, count)
            values[contestant.name].append(1e3 * seconds / count / case.divisor)
    return values


def compared(measurements: Sequence[Measurement]) -> list[str]:
    """How much more the peers take than ours, in a line a row."""
    return [
        f"{m.benchmark} at {m.case}: {m.contestant} takes {m.ratio:.2f} times as much "
        f"{'memory' if m.unit == 'MiB' else 'time'} as ours"
        for m in measurements
        if m.ratio != 1
    ]


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean of the logarithms; NaN for no values."""
    return statistics.geometric_mean(found) if (found := list(values)) else math.nan


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def graphics_processor() -> tuple[str, str]:
    """Name of the GPU with its memory and driver, and its architecture with the CUDA version."""
    properties = torch.cuda.get_device_properties()
    driver = Path("/proc/driver/nvidia/version")
    text = driver.read_text(encoding="utf-8").splitlines()[0] if driver.exists() else ""
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {text}".rstrip("; ")
    version = torch.version.hip or torch.version.cuda
    return name, f"{properties.major}.{properties.minor}, runtime {version}"


def environment(command: str, allocator: str, device: str = "cpu") -> dict[str, str]:
    """The columns of results.csv that say where, when and with what a row was measured.

    On "cuda" the columns isa and cpu are those of the GPU.
    """
    if device == "cuda":
        name, architecture = graphics_processor()
        return environment(command, allocator) | {"cpu": name, "isa": architecture}
    reason = ops.implementations()["cpu"].reason
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "threads": str(torch.get_num_threads()),
        "isa": reason.rpartition(" ")[2] if ops.implementations()["cpu"].available else "none",
        "cpu": processor(),
        "load": f"{os.getloadavg()[0]:.2f}",
        "allocator": allocator,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchvision", "timm", "senet")},
    }


def check_results(path: Path) -> None:
    """See that rows can be added to a CSV file, before anything is measured.

    Raises:
        UserError: the file has other columns, or cannot be written.
    """
    check_file(path, "--results")
    _former(path)


def _former(path: Path) -> str:
    """The rows that a CSV file has, with their header; nothing of a new or empty one."""
    if not path.exists():
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another file") from error
    if text and text.partition("\n")[0] != ",".join(COLUMNS):
        raise UserError(f"{path} has other columns than `senet bench` writes; choose another file")
    return text


def append_results(path: Path, measurements: Sequence[Measurement], where: dict[str, str]) -> None:
    """Add a row a measurement to a CSV file, with a header if it is new.

    Raises:
        UserError: the file has other columns.
    """
    text = _former(path)
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    if not text:
        writer.writeheader()
    for m in measurements:
        q20, q50, q80 = (f"{value:.4g}" for value in m.quantiles)
        numbers = {"q20": q20, "q50": q50, "q80": q80, "ratio": f"{m.ratio:.4g}"}
        names = {"benchmark": m.benchmark, "case": m.case, "contestant": m.contestant}
        rest = {"unit": m.unit, "rounds": str(m.rounds)}
        writer.writerow({**where, **names, **numbers, **rest})
    atomic_write(path, text + out.getvalue())


def run_cases(
    cases: Sequence[Case], *, rounds: int, warmup: int, advance: Callable[[str], None]
) -> Iterator[list[Measurement]]:
    """Measure the cases one after the other.

    Args:
        cases: what to measure.
        rounds, warmup: as for `measure`.
        advance: told the name of each case before it begins.
    """
    for case in cases:
        advance(f"{case.benchmark} {case.name}")
        yield measure(case, rounds=rounds, warmup=warmup)
