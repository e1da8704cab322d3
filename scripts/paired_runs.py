"""Tables and a figure for docs/results.md from run folders of `senet train`, paired by their seeds.

    python scripts/paired_runs.py plain=runs/plain_s* --to se16=runs/se16_s* --figure curves.png

The first group is what the others are compared with. Top-1 is that of the last epoch; the speed is
the median of a run's epochs, told as a ratio within each seed.
"""

import argparse
import statistics
from pathlib import Path

from senet.experiments.runs import read_rows
from senet.reports.comparison import PairedDifference, spread
from senet.reports.figures import learning_curves, render, themed
from senet.support.files import atomic_write
from senet.training.config import RUN_CONFIG, RunConfig

Runs = dict[int, Path]


def group(values: list[str]) -> tuple[str, Runs]:
    """Name and runs by seed of NAME=RUN RUN…."""
    name, _, first = values[0].partition("=")
    runs = [Path(run) for run in (first, *values[1:])]
    return name, {RunConfig.from_toml(run / RUN_CONFIG).seed: run for run in runs}


def speed(run: Path) -> float:
    """Images/s in training, median over the epochs."""
    return statistics.median(row["images_per_second"] for row in read_rows(run / "timings.csv"))


def main() -> None:
    """Print the tables, draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="+", metavar="NAME=RUN RUN…")
    parser.add_argument("--to", nargs="+", action="append", required=True, metavar="NAME=RUN RUN…")
    parser.add_argument("--figure", type=Path, help="PNG of the learning curves")
    arguments = parser.parse_args()
    groups = dict(map(group, (arguments.base, *arguments.to)))
    (base, plain), *others = groups.items()
    for name, runs in others:
        if runs.keys() != plain.keys():
            parser.error(f"seeds differ: {base} {sorted(plain)}, {name} {sorted(runs)}")
    seeds = sorted(plain)
    rows = {
        name: [read_rows(runs[s] / "metrics.csv") for s in seeds] for name, runs in groups.items()
    }
    if len({len(run) for runs in rows.values() for run in runs}) > 1:
        parser.error("the runs have not all as many epochs")
    tops = {name: [run[-1]["top1"] for run in runs] for name, runs in rows.items()}
    print("| seed | " + " | ".join(groups) + " |\n" + "|---" * (1 + len(groups)) + "|")
    for i, seed in enumerate(seeds):
        print(f"| {seed} | " + " | ".join(f"{tops[name][i]:.2f}" for name in groups) + " |")
    columns = ("top-1", f"minus {base}", "training loss", "validation loss", "images/s, ratio")
    print(f"\n| n = {len(seeds)} | " + " | ".join(columns) + " |\n" + "|---" * 6 + "|")
    for name, runs in groups.items():
        losses = [
            f"{statistics.mean(run[-1][key] for run in rows[name]):.3f}"
            for key in ("train_loss", "val_loss")
        ]
        difference, ratio = "", ""
        if name != base:
            difference = str(PairedDifference.of(tops[base], tops[name]))
            ratio = f"{statistics.median(speed(runs[s]) / speed(plain[s]) for s in seeds):.2f}"
        print(
            f"| {name} | {spread(tops[name], 2)} | {difference} | {' | '.join(losses)} | {ratio} |"
        )
    if arguments.figure:
        with themed():
            atomic_write(arguments.figure, render(learning_curves(rows), "png"))


if __name__ == "__main__":
    main()
