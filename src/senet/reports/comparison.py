"""The report of a comparison: statistics, sentences, JSON and a page of HTML."""

import base64
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from senet.reports.figures import (
    Gates,
    Row,
    confusion_matrix,
    gates_per_stage,
    learning_curves,
    render,
    save_figure,
    themed,
)
from senet.reports.page import escape, page, table
from senet.support.files import atomic_write
from senet.support.text import count, duration


@dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences with its 95% confidence interval (Student t, n - 1 degrees).

    Attributes:
        n: pairs (seeds).
        mean: mean difference.
        low: lower end of the interval; NaN for a single pair, which has no spread.
        high: upper end.
    """

    n: int
    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0; never for a single pair."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """ "+0.31 (-0.10 to +0.72)"; without an interval for a single pair."""
        mean = f"{self.mean:+.2f}"
        return mean if self.n == 1 else f"{mean} ({self.low:+.2f} to {self.high:+.2f})"

    @classmethod
    def of(cls, baseline: Sequence[float], other: Sequence[float]) -> "PairedDifference":
        """Differences other - baseline, seed by seed.

        Raises:
            ValueError: the lengths differ or are 0.
        """
        if len(baseline) != len(other) or not baseline:
            raise ValueError(f"need equally many values, got {len(baseline)} and {len(other)}")
        differences = [b - a for a, b in zip(baseline, other, strict=True)]
        n = len(differences)
        mean = statistics.fmean(differences)
        if n == 1:
            return cls(n, mean, math.nan, math.nan)
        from scipy.stats import t  # here: it takes a second to load

        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
        return cls(n, mean, mean - half, mean + half)


@dataclass(frozen=True)
class NetworkResult:
    """What the runs of one network gave, a value a seed in the order of the seeds.

    Attributes:
        name: what it is called.
        parameters: trainable parameters.
        multiply_adds: of one image.
        top1: top-1 accuracy after the last epoch, %.
        top5: top-5 accuracy after the last epoch, %.
        images_per_second: training speed, median over the epochs.
        seconds: time of the run, evaluation included.
        histories: the rows of each run's metrics.csv.
        confusion: counts (true class, predicted class), summed over the seeds.
    """

    name: str
    parameters: int
    multiply_adds: int
    top1: tuple[float, ...]
    top5: tuple[float, ...]
    images_per_second: tuple[float, ...]
    seconds: tuple[float, ...]
    histories: tuple[Sequence[Row], ...]
    confusion: NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """A network without and with SE, trained with the same recipe, data and seeds.

    Attributes:
        plain: the baseline.
        se: the network with SE blocks.
        data: name of the data set.
        recipe: name of the recipe.
        epochs: epochs of each run.
        seeds: seeds, in the order of the values of both networks.
        validation_images: images that each accuracy is measured on.
        classes: class names.
        gates: mean gates by layer, (classes, channels), mean over the seeds.
        neutral_gate: gate value that leaves a channel unchanged, if the gates can take it.
    """

    plain: NetworkResult
    se: NetworkResult
    data: str
    recipe: str
    epochs: int
    seeds: tuple[int, ...]
    validation_images: int
    classes: tuple[str, ...]
    gates: Gates
    neutral_gate: float | None

    @property
    def difference(self) -> PairedDifference:
        """Top-1 of SE minus plain in percentage points, over the seeds."""
        return PairedDifference.of(self.plain.top1, self.se.top1)

    @property
    def speed_ratio(self) -> PairedDifference:
        """Training speed of SE over that of plain, which ran in turns, paired by seed.

        Its mean is the geometric one, its interval that of the logarithms, both as ratios; use
        `low > 1` or `high < 1` for what is significant.
        """
        logarithms = (np.log(each.images_per_second).tolist() for each in (self.plain, self.se))
        ratio = PairedDifference.of(*logarithms)
        return PairedDifference(ratio.n, *map(math.exp, (ratio.mean, ratio.low, ratio.high)))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation (n - 1); only the value where there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def verdict(comparison: Comparison) -> str:
    """What the comparison allows one to say about accuracy, in one or two plain sentences."""
    difference = comparison.difference
    gain = f"{difference.mean:+.2f} points of top-1 (SE minus plain)"
    if difference.n == 1:
        return (
            f"{gain} for one seed: no uncertainty can be given, so this shows nothing about SE. "
            "Use at least 3 seeds."
        )
    interval = (
        f"{gain}, 95% interval {difference.low:+.2f} to {difference.high:+.2f} "
        f"over {difference.n} paired seeds"
    )
    if not difference.significant:
        return f"{interval}: not significant. Seeds differ more than the two networks do."
    better = "better" if difference.mean > 0 else "worse"
    return f"{interval}: significant, SE is {better} here."


def cost(comparison: Comparison) -> str:
    """What SE cost, in one sentence."""
    plain, se = comparison.plain, comparison.se
    parameters = 100 * (se.parameters / plain.parameters - 1)
    multiply_adds = 100 * (se.multiply_adds / plain.multiply_adds - 1)
    return (
        f"SE adds {parameters:.1f}% parameters and {multiply_adds:.2f}% multiply-adds. "
        f"{_speed(comparison.speed_ratio)}"
    )


def _speed(ratio: PairedDifference) -> str:
    """What the runs allow one to say about the speed of training, which varies with all else."""
    if ratio.n == 1:
        return "One run of each says nothing about its speed of training."
    interval = f"{100 * ratio.low:.0f}% to {100 * ratio.high:.0f}%"
    if not (ratio.low > 1 or ratio.high < 1):
        return (
            f"Its speed of training does not differ measurably: 95% interval {interval} of the "
            f"plain network's images/s over {ratio.n} paired runs."
        )
    return (
        f"It trains at {100 * ratio.mean:.0f}% of the plain network's images/s, 95% interval "
        f"{interval} over {ratio.n} paired runs."
    )


def table_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Label, plain and SE cell of each line of the table."""
    plain, se = comparison.plain, comparison.se

    def row(label: str, show: Any) -> tuple[str, str, str]:
        return label, show(plain), show(se)

    return [
        row("parameters", lambda r: f"{r.parameters:,}"),
        row("multiply-adds", lambda r: count(r.multiply_adds)),
        row("epochs × seeds", lambda r: f"{comparison.epochs} × {len(r.top1)}"),
        row("top-1 (%)", lambda r: spread(r.top1, 2)),
        row("top-5 (%)", lambda r: spread(r.top5, 2)),
        row("training (images/s)", lambda r: spread(r.images_per_second, 0)),
        row("time of all seeds", lambda r: duration(sum(r.seconds))),
    ]


def caption(comparison: Comparison) -> str:
    """What the table is of."""
    return (
        f"{comparison.data}, recipe {comparison.recipe}, seeds "
        f"{', '.join(map(str, comparison.seeds))}; after the last epoch, on "
        f"{comparison.validation_images:,} validation images; mean ± sd over the seeds"
    )


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON: every number the table and the figures are made of."""

    def network(result: NetworkResult) -> dict[str, Any]:
        content = asdict(result)
        content["histories"] = [[dict(row) for row in run] for run in result.histories]
        content["confusion"] = result.confusion.tolist()
        return content

    difference = comparison.difference
    single, speed = difference.n == 1, comparison.speed_ratio
    content = {
        "data": comparison.data,
        "recipe": comparison.recipe,
        "epochs": comparison.epochs,
        "seeds": comparison.seeds,
        "validation_images": comparison.validation_images,
        "classes": comparison.classes,
        "plain": network(comparison.plain),
        "se": network(comparison.se),
        "top1_difference": {
            "n": difference.n,
            "mean": difference.mean,
            "interval_95": None if single else [difference.low, difference.high],
            "significant": difference.significant,
        },
        "speed_ratio": {
            "n": speed.n,
            "mean": speed.mean,
            "interval_95": None if single else [speed.low, speed.high],
        },
        "gates": {name: values.tolist() for name, values in comparison.gates.items()},
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _draw(comparison: Comparison) -> dict[str, Any]:
    plain, se = comparison.plain, comparison.se
    return {
        "learning_curves": learning_curves({plain.name: plain.histories, se.name: se.histories}),
        "confusion_matrix": confusion_matrix(
            {plain.name: plain.confusion, se.name: se.confusion}, comparison.classes
        ),
        "gates_per_stage": gates_per_stage(
            comparison.gates, comparison.classes, neutral=comparison.neutral_gate
        ),
    }


def _descriptions(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Heading and text alternative of each figure."""
    plain, se = comparison.plain, comparison.se
    gates = "; ".join(
        f"{name}: mean {values.mean():.2f}, spread between classes {values.std(axis=0).mean():.3f}"
        for name, values in comparison.gates.items()
    )
    return {
        "learning_curves": (
            "Learning curves",
            "Top-1 accuracy and losses by epoch, mean over the seeds with the range from lowest to "
            f"highest. After epoch {comparison.epochs}: {plain.name} {spread(plain.top1, 2)}%, "
            f"{se.name} {spread(se.top1, 2)}%.",
        ),
        "confusion_matrix": (
            "Confusion matrices",
            "Share of each true class (row) that was taken for each class (column), in per cent, "
            f"summed over the seeds. {_worst(plain, comparison.classes)} "
            f"{_worst(se, comparison.classes)}",
        ),
        "gates_per_stage": (
            "Gates per stage",
            f"Mean gate of every channel for up to four classes, averaged over images and seeds. "
            f"{gates}.",
        ),
    }


def _worst(result: NetworkResult, classes: Sequence[str]) -> str:
    """The most frequent confusion of a network as a sentence."""
    totals = np.maximum(result.confusion.sum(axis=1, keepdims=True), 1)
    wrong = result.confusion / totals
    np.fill_diagonal(wrong, 0)
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    share = 100 * wrong[row, column]
    return (
        f"{result.name} most often takes {classes[int(row)]} for {classes[int(column)]} "
        f"({share:.0f}%)."
    )


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write `results.json`, `figures/*.{png,svg}` and the self-contained `report.html`.

    Raises:
        OSError: the folder cannot be written.
    """
    pictures: dict[str, dict[str, bytes]] = {}
    with themed("light"):
        for name, figure in _draw(comparison).items():
            pictures[name] = {"light": save_figure(figure, folder / "figures", name)}
    with themed("dark"):
        for name, figure in _draw(comparison).items():
            pictures[name]["dark"] = render(figure, "svg")
    atomic_write(folder / "results.json", to_json(comparison))
    atomic_write(folder / "report.html", _page(comparison, pictures))


def _page(comparison: Comparison, pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    """The report as one HTML file without scripts or links; its figures follow the theme."""
    plain, se = comparison.plain.name, comparison.se.name
    told = f'<p class="verdict">{escape(verdict(comparison))}<br>{escape(cost(comparison))}</p>'
    sections = []
    for name, (heading, text) in _descriptions(comparison).items():
        light, dark = (
            "data:image/svg+xml;base64," + base64.b64encode(pictures[name][theme]).decode()
            for theme in ("light", "dark")
        )
        sections.append(
            f"<section><h2>{heading}</h2><figure><picture>"
            f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
            f'<img src="{light}" alt="{escape(heading)}: {escape(text)}"></picture>'
            f"<figcaption>{escape(text)}</figcaption></figure></section>"
        )
    numbers = table(("", plain, se), table_rows(comparison), caption(comparison))
    return page(f"{plain} and {se} on {comparison.data}", [told, numbers, *sections])
