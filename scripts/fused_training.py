"""Does training through the operator give what the modules give? Fused and not, seed by seed.

For each network and seed the same training twice: its tails and SE blocks in the operator
(`senet.fuse`; networks of this package call it themselves) and in PyTorch's modules (of a network
of this package `senet.ops.use("reference")`), with the same weights, images and order.
Prints how far the losses of the first steps lie apart, beside what another number of threads does
to the modules alone, and top-1 after the last epoch.

    python scripts/fused_training.py --data cifar10 --epochs 4 --seeds 3 --out runs/fused

An interrupted run goes on from OUT/results.jsonl and the run folders beside it.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from resumable import Row, rows_of

from senet import ops
from senet.networks.anywhere import is_foreign
from senet.reports.comparison import PairedDifference, spread
from senet.training.config import RUN_CONFIG, RunConfig
from senet.training.loop import resume, train
from senet.training.recipe import get_recipe
from senet.training.session import Session

MODELS = ("timm:efficientnet_b0", "se_resnet8_cifar")
STEPS = 20
FUSED, MODULES, THREADS = "fused", "modules", "modules, another number of threads"


def _way(model: str, way: str) -> AbstractContextManager[object]:
    """How a network of this package runs, which knows no `fuse`."""
    return nullcontext() if way == FUSED or is_foreign(model) else ops.use("reference")


def _first_losses(config: RunConfig) -> list[float]:
    session = Session(config)
    losses = []
    for step, (images, targets) in enumerate(session.batches(0), 1):
        loss, _ = session.finished(session.train_step(images, targets, step))
        losses.append(loss)
        if step == STEPS:
            break
    return losses


def examine(name: str, options: argparse.Namespace) -> Row:
    """Train one network in one way with one seed."""
    model, seed, way = name.split("|")
    config = RunConfig(
        model=model,
        data=options.data,
        recipe=get_recipe("quick", epochs=options.epochs, lr=options.lr),
        seed=int(seed),
        fuse=way == FUSED or not is_foreign(model),
        out=options.out / f"{model.rpartition(':')[2]}-{way}-{seed}",
        device="cpu",
    )
    threads = options.threads
    with _way(model, way):
        torch.set_num_threads(threads + 1 if way == THREADS else threads)
        row: Row = {"name": name, "losses": _first_losses(config)}
        torch.set_num_threads(threads)
        if way != THREADS:
            started = (config.out / RUN_CONFIG).is_file()
            row["top1"] = (resume(config.out) if started else train(config)).history[-1]["top1"]
    print(f"{name}: {row['losses'][-1]:.4f} {row.get('top1', '')}", flush=True)
    return row


def _apart(rows: dict[str, Row], model: str, seeds: range, way: str, steps: slice) -> float:
    """The largest relative difference of the losses of some steps from the modules', all seeds."""
    found = 0.0
    for seed in seeds:
        a, b = (rows[f"{model}|{seed}|{each}"]["losses"][steps] for each in (way, MODULES))
        found = max([found, *(abs(x - y) / y for x, y in zip(a, b, strict=True))])
    return found


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    names = [
        f"{model}|{seed}|{way}"
        for model in options.models
        for seed in seeds
        for way in (FUSED, MODULES, THREADS)
    ]
    found = rows_of(names, options.out / "results.jsonl", lambda name: examine(name, options))
    rows = {row["name"]: row for row in found}
    print("| network | compared with its modules | step 1 | steps 2 to 5 | steps 6 to 20 |")
    print("|---|---|---|---|---|")
    for model in options.models:
        for way in (FUSED, THREADS):
            cells = (
                f"{_apart(rows, model, seeds, way, steps):.1e}"
                for steps in (slice(0, 1), slice(1, 5), slice(5, STEPS))
            )
            print(f"| {model} | {way} | " + " | ".join(cells) + " |")
    print("\n| network | top-1 fused | modules | fused minus modules |\n|---|---|---|---|")
    for model in options.models:
        fused, modules = (
            [rows[f"{model}|{seed}|{way}"]["top1"] for seed in seeds] for way in (FUSED, MODULES)
        )
        difference = PairedDifference.of(modules, fused)
        print(
            f"| {model} | {spread(fused, 2)} | {spread(modules, 2)} | {difference.mean:+.2f}, 95% "
            f"interval {difference.low:+.2f} to {difference.high:+.2f} |"
        )


if __name__ == "__main__":
    main()
