"""Tables for docs/results.md from run folders of `senet train`: plain against SE, seed by seed.

    python scripts/paired_runs.py PLAIN_RUN... --se SE_RUN...

Runs are paired by the seed in their config.toml.
"""

import argparse
import csv
import tomllib
from pathlib import Path

from senet.reports.comparison import PairedDifference, spread


def read(run: Path) -> tuple[int, list[dict[str, str]]]:
    """Seed and rows of metrics.csv of a run."""
    seed = tomllib.loads((run / "config.toml").read_text())["seed"]
    with (run / "metrics.csv").open() as file:
        return seed, list(csv.DictReader(file))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", nargs="+", type=Path)
    parser.add_argument("--se", nargs="+", type=Path, required=True)
    arguments = parser.parse_args()
    plain, se = (dict(map(read, runs)) for runs in (arguments.plain, arguments.se))
    seeds = sorted(plain.keys() & se.keys())
    if not seeds or plain.keys() != se.keys():
        parser.error(f"seeds differ: plain {sorted(plain)}, SE {sorted(se)}")
    print("| seed | epochs | plain top-1 | SE top-1 | plain loss | SE loss |")
    print("|---|---|---|---|---|---|")
    for seed in seeds:
        a, b = plain[seed][-1], se[seed][-1]
        numbers = [float(row[key]) for key in ("top1", "val_loss") for row in (a, b)]
        print(f"| {seed} | {a['epoch']} | " + " | ".join(f"{n:.2f}" for n in numbers[:2]) + " | "
              + " | ".join(f"{n:.4f}" for n in numbers[2:]) + " |")  # fmt: skip
    tops = [[float(runs[seed][-1]["top1"]) for seed in seeds] for runs in (plain, se)]
    difference = PairedDifference.of(*tops)
    print(f"\nplain {spread(tops[0], 2)}, SE {spread(tops[1], 2)} (mean ± sd, n = {len(seeds)}); "
          f"SE minus plain {difference.mean:+.2f} points, "
          f"95% interval {difference.low:+.2f} to {difference.high:+.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
