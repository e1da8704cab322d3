"""A trained plain network improved by gates alone, against equally long training of its head.

For each seed: train a plain network; insert SE; from there train (a) the gates alone and (b) the
classifier alone, both for as many epochs with the same recipe, data order and learning rate. Prints
the top-1 of the last epoch of each (not of the best one, which would favour whoever varies most)
and the paired differences with their 95% interval (Student's t over the seeds).

    python scripts/gates_alone.py --data embedded --epochs 3 --tune 2 --seeds 3 --out runs/alone
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from scipy import stats

from senet.commands.insert import insert_checkpoint
from senet.training.config import RunConfig
from senet.training.loop import RunResult, train
from senet.training.recipe import get_recipe


def run(config: RunConfig) -> RunResult:
    """Train and tell the accuracy of the last epoch."""
    result = train(config)
    print(f"{config.out}: {result.history[-1]['top1']:.2f}%", flush=True)
    return result


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Top-1 (%) of the plain network, with a tuned head, and with tuned gates."""
    folder = options.out / f"seed{seed}"
    recipe = get_recipe("quick", epochs=options.epochs)
    base = run(
        RunConfig(
            model=options.model,
            data=options.data,
            recipe=recipe,
            seed=seed,
            out=folder / "plain",
            image_size=options.image_size,
        )
    )
    inserted = insert_checkpoint(
        folder / "inserted",
        weights=folder / "plain" / "checkpoints" / "last",
        options={"reduction": options.reduction},
    )
    name = f"se_{options.model}"
    tuned = {}
    for what in ("head", "se"):
        config = RunConfig(
            model=name,
            data=options.data,
            recipe=replace(get_recipe("quick", epochs=options.tune), lr=options.lr),
            seed=seed,
            init=str(inserted.folder),
            train=what,
            out=folder / what,
            image_size=options.image_size,
        )
        tuned[what] = run(config).history[-1]["top1"]
    return {"plain": base.history[-1]["top1"], **tuned}


def difference(rows: list[dict[str, float]], a: str, b: str) -> str:
    """Mean paired difference of two columns with its 95% interval, percentage points."""
    values = [row[a] - row[b] for row in rows]
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f} (one seed: no interval)"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}"


def main() -> None:
    """Run all seeds, print a table, write results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet8_cifar")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--tune", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--reduction", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    rows = [one_seed(options, seed) for seed in range(options.seeds)]
    print("| seed | plain | + head | + gates alone |\n|---|---|---|---|")
    for seed, row in enumerate(rows):
        print(f"| {seed} | {row['plain']:.2f} | {row['head']:.2f} | {row['se']:.2f} |")
    print(f"gates − plain: {difference(rows, 'se', 'plain')}")
    print(f"gates − head:  {difference(rows, 'se', 'head')}")
    (options.out / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
