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
from pathlib import Path

from senet.experiments.runs import read_rows
from senet.reports.comparison import PairedDifference, spread
from senet.reports.figures import learning_curves, render, themed
from senet.support.files import atomic_write
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.state import load_training_state

Epochs = list[dict[str, float]]
Runs = dict[int, Epochs]  # by seed
Record = dict[str, str]  # an epoch of a run
# Of a record, beside the numbers of the epoch.
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


def table(file: Path) -> list[Record]:
    """The rows of a file of records; none where there is no file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as content:
        return list(csv.DictReader(content))


def with_run(rows: list[Record], name: str, folder: Path) -> list[Record]:
    """Records with those of a run, in the place of what they had of the same network and seed."""
    seed, epochs = run_of(folder)
    state = load_training_state(folder)
    assert state is not None  # it is finished
    where = state["environment"]
    own = {"network": name, "seed": str(seed)} | {key: str(where[key]) for key in OWN[2:]}
    kept = [row for row in rows if (row["network"], row["seed"]) != (name, str(seed))]
    return kept + [own | {key: f"{value:.6g}" for key, value in row.items()} for row in epochs]


def write(file: Path, rows: list[Record]) -> None:
    """Write a file of records, in order."""
    rows = sorted(rows, key=lambda row: (row["network"], int(row["seed"]), float(row["epoch"])))
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(file, content.getvalue())


def runs_of(rows: list[Record], name: str) -> Runs:
    """The runs of a network among records."""
    found: Runs = {}
    for row in rows:
        if row["network"] == name:
            values = {key: float(value) for key, value in row.items() if key not in OWN}
            found.setdefault(int(row["seed"]), []).append(values)
    return found


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
    records = table(arguments.records) if arguments.records else []
    names = []
    for first, *more in (arguments.base, *arguments.to):
        name, _, folder = first.partition("=")
        names.append(name)
        for run in filter(None, (folder, *more)):
            records = with_run(records, name, Path(run))
    groups = {name: runs_of(records, name) for name in names}
    (base, plain), *others = groups.items()
    if not plain:
        parser.error(f"no runs of {base}: give some by {base}=RUN, or --records with some")
    if arguments.records:
        write(arguments.records, records)
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
