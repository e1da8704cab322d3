"""A trained plain network trained further: its head, all of it, inserted gates, all with them.

From the last checkpoint of each plain run, with the same recipe, number of epochs, data and order:

- `head`: the classifier alone learns;
- `plain`: the whole plain network learns;
- `gates`: SE blocks are inserted and they alone learn;
- `inserted`: SE blocks are inserted and the whole network learns.

Prints top-1 of the last epoch (not of the best one, which would favour whoever varies most) and
paired differences with their 95% interval (Student's t over the seeds). Without `--base` the plain
networks are trained first. Call it again to go on where it was stopped: seeds that are in the file
of `--records` are not run again, and are in the tables wherever they ran (`--seeds 0`: no others).

    python scripts/insert_and_adapt.py --data embedded --seeds 3 --epochs 3 --tune 2 --out adapted
    python scripts/insert_and_adapt.py --data cifar10 --base runs/plain* --tune 5 --out adapted
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from resumable import Row, recorded, rows_of

from senet.commands.insert import insert_checkpoint
from senet.experiments.runs import read_rows
from senet.reports.comparison import PairedDifference
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.loop import resume, train
from senet.training.recipe import get_recipe

ARMS = {"head": "head", "plain": "all", "gates": "se", "inserted": "all"}  # what is trained
PAIRS = (
    ("before", "head"),
    ("before", "gates"),
    ("head", "gates"),
    ("before", "plain"),
    ("plain", "inserted"),
)


def last_top1(run: Path) -> float:
    """Top-1 (%) after the last epoch of a finished run."""
    return read_rows(run / "metrics.csv")[-1]["top1"]


def trained(out: Path, **options: Any) -> Path:
    """A run that is begun, gone on with, or finished already; its folder."""
    if not (out / "checkpoints" / "last").is_dir():
        train(RunConfig(out=out, **options))
    elif len(read_rows(out / "metrics.csv")) < options["recipe"].epochs:
        resume(out)
    print(f"{out}: {last_top1(out):.2f}%", flush=True)
    return out


def adapted(options: argparse.Namespace, base: Path) -> Row:
    """Top-1 (%) of a plain run before and after each arm."""
    known = RunConfig.from_toml(base / RUN_CONFIG)
    model, seed = known.model, known.seed
    last, folder = base / "checkpoints" / "last", options.out / f"seed{seed}"
    blocks = folder / "blocks"
    if not blocks.is_dir():
        insert_checkpoint(blocks, weights=last, options={"reduction": options.reduction})
    recipe = replace(get_recipe("quick", epochs=options.tune), lr=options.tune_lr)
    found: Row = {"name": str(seed), "before": last_top1(base)}
    for arm, parts in ARMS.items():
        own = arm in ("gates", "inserted")
        run = trained(
            folder / arm,
            model=f"se_{model}" if own else model,
            data=options.data,
            recipe=recipe,
            seed=seed,
            init=str(blocks if own else last),
            train=parts,
            image_size=options.image_size,
        )
        found[arm] = last_top1(run)
    return found


def bases(options: argparse.Namespace) -> list[Path]:
    """The plain runs, trained if they are not given."""
    if options.base:
        return list(options.base)
    recipe = replace(get_recipe("quick", epochs=options.epochs), lr=options.lr)
    return [
        trained(
            options.out / f"seed{seed}" / "base",
            model=options.model,
            data=options.data,
            recipe=recipe,
            seed=seed,
            image_size=options.image_size,
        )
        for seed in range(options.seeds)
    ]


def main() -> None:
    """Run all seeds and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--base", nargs="+", type=Path, help="finished runs of `senet train`")
    parser.add_argument("--model", default="resnet8_cifar", help="without --base")
    parser.add_argument("--epochs", type=int, default=8, help="of the plain networks")
    parser.add_argument("--lr", type=float, default=0.2, help="of the plain networks")
    parser.add_argument("--seeds", type=int, default=3, help="of the plain networks")
    parser.add_argument("--tune", type=int, default=4, help="epochs of each arm")
    parser.add_argument("--tune-lr", type=float, default=0.1, help="of each arm")
    parser.add_argument("--reduction", type=float, default=4)
    parser.add_argument("--records", type=Path, help="JSON lines, by default in OUT")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    records = options.records or options.out / "results.jsonl"
    given = {str(RunConfig.from_toml(base / RUN_CONFIG).seed): base for base in bases(options)}
    seeds = sorted({*given, *recorded(records)}, key=int)
    rows = rows_of(seeds, records, lambda seed: adapted(options, given[seed]))
    names = ("before", *ARMS)
    print("| seed | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    for row in rows:
        print(f"| {row['name']} | " + " | ".join(f"{row[name]:.2f}" for name in names) + " |")
    if len(rows) < 2:
        return
    print("\n| difference | points, 95% interval |\n|---|---|")
    for a, b in PAIRS:
        d = PairedDifference.of(*([row[name] for row in rows] for name in (a, b)))
        print(f"| {b} minus {a} | {d} |")


if __name__ == "__main__":
    main()
