"""Tables and a figure for docs/results.md from runs of `senet train`, paired by their seeds.

    python scripts/paired_runs.py plain=runs/plain_s* --to se16=runs/se16_s* --figure curves.png

The first group is what the others are compared with. Top-1 is that of the last epoch; the speed is
the median of a run's epochs, told as a ratio within each seed.

With `--records` the epochs of finished runs are kept in a CSV file, and groups that are named
without runs are read from there. Runs that take hours are then recorded when and where each is
done, and tables and figure drawn without them:

    python scripts/paired_runs.py --records runs.csv plain=runs/plain_s0 --to se16=runs/se16_s0
    python scripts/paired_runs.py --records runs.csv plain --to se16 --figure curves.png
"""

import argparse
import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from senet.experiments.runs import read_rows
from senet.reports.comparison import PairedDifference, spread
from senet.reports.figures import learning_curves, render, themed
from senet.support.files import atomic_write
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.state import load_training_state

Epochs = list[dict[str, float]]
Runs = dict[int, Epochs]  # by seed
# Of a record, beside the columns of the run's metrics.csv.
OWN = ("network", "seed", "instructions", "torch")


def run_of(folder: Path) -> tuple[int, Epochs]:
    """Seed of a run, and its epochs with the speed of each."""
    if not (folder / RUN_CONFIG).is_file():
        raise SystemExit(f"{folder} is no run of senet train")
    config = RunConfig.from_toml(folder / RUN_CONFIG)
    rows, timings = (read_rows(folder / f"{name}.csv") for name in ("metrics", "timings"))
    if len(rows) != config.recipe.epochs:
        raise SystemExit(f"{folder} has {len(rows)} of {config.recipe.epochs} epochs: finish it")
    for row, timing in zip(rows, timings, strict=True):
        row["images_per_second"] = timing["images_per_second"]
    return config.seed, rows


def recorded(file: Path) -> dict[str, Runs]:
    """The runs of a file of records, by network."""
    found: dict[str, Runs] = {}
    for row in table(file):
        epochs = found.setdefault(row["network"], {}).setdefault(int(row["seed"]), [])
        epochs.append({key: float(value) for key, value in row.items() if key not in OWN})
    return found


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a file of records; none where there is no file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as content:
        return list(csv.DictReader(content))


def record(file: Path, name: str, folders: Sequence[Path]) -> None:
    """Write the epochs of runs into a file of records, in the place of those of the same seeds."""
    rows = table(file)
    for folder in folders:
        seed, epochs = run_of(folder)
        state = load_training_state(folder)
        assert state is not None  # it is finished
        where = state["environment"]
        own = {"network": name, "seed": str(seed)} | {key: str(where[key]) for key in OWN[2:]}
        rows = [row for row in rows if (row["network"], row["seed"]) != (name, str(seed))]
        rows += [own | {key: f"{value:.6g}" for key, value in row.items()} for row in epochs]
    rows.sort(key=lambda row: (row["network"], int(row["seed"]), float(row["epoch"])))
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(file, content.getvalue())


def group(values: Sequence[str], records: Path | None) -> tuple[str, Runs]:
    """Name and runs of NAME=RUN RUN…, or of NAME, which is in the records."""
    name, _, first = values[0].partition("=")
    folders = [Path(run) for run in (first, *values[1:]) if run]
    if records is None:
        return name, dict(run_of(folder) for folder in folders)
    if folders:
        record(records, name, folders)
    return name, recorded(records).get(name, {})


def main() -> None:
    """Print the tables, draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="+", metavar="NAME=RUN RUN…")
    parser.add_argument("--to", nargs="+", action="append", default=[], metavar="NAME=RUN RUN…")
    parser.add_argument("--records", type=Path, help="CSV of runs that are kept")
    parser.add_argument("--figure", type=Path, help="PNG of the learning curves")
    arguments = parser.parse_args()
    groups = dict(group(each, arguments.records) for each in (arguments.base, *arguments.to))
    (base, plain), *others = groups.items()
    if not plain:
        parser.error(f"{arguments.records} has no runs of {base}")
    for name, runs in others:
        if runs.keys() != plain.keys():
            parser.error(f"seeds differ: {base} {sorted(plain)}, {name} {sorted(runs)}")
    seeds = sorted(plain)
    rows = {name: [runs[seed] for seed in seeds] for name, runs in groups.items()}
    if len({len(run) for runs in rows.values() for run in runs}) > 1:
        parser.error("the runs have not all as many epochs")
    tops = {name: [run[-1]["top1"] for run in runs] for name, runs in rows.items()}
    speeds = {
        name: [statistics.median(row["images_per_second"] for row in run) for run in runs]
        for name, runs in rows.items()
    }
    print("| seed | " + " | ".join(groups) + " |\n" + "|---" * (1 + len(groups)) + "|")
    for i, seed in enumerate(seeds):
        print(f"| {seed} | " + " | ".join(f"{tops[name][i]:.2f}" for name in groups) + " |")
    columns = ("top-1", f"minus {base}", "training loss", "validation loss", "images/s, ratio")
    print(f"\n| n = {len(seeds)} | " + " | ".join(columns) + " |\n" + "|---" * 6 + "|")
    for name in groups:
        losses = [
            f"{statistics.mean(run[-1][key] for run in rows[name]):.3f}"
            for key in ("train_loss", "val_loss")
        ]
        difference, ratio = "", ""
        if name != base:
            difference = str(PairedDifference.of(tops[base], tops[name]))
            pairs = zip(speeds[name], speeds[base], strict=True)
            ratio = f"{statistics.median(own / other for own, other in pairs):.2f}"
        print(
            f"| {name} | {spread(tops[name], 2)} | {difference} | {' | '.join(losses)} | {ratio} |"
        )
    if arguments.figure:
        with themed():
            atomic_write(arguments.figure, render(learning_curves(rows), "png"))


if __name__ == "__main__":
    main()
