"""`senet optimize`: any network made ready for inference."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from senet.cli.options import OptionalWhole, Switch, Whole, named, prepare_process
from senet.cli.tables import new_table, print_table
from senet.support.collector import importing
from senet.support.places import check_file

if TYPE_CHECKING:
    from rich.table import Table

    from senet.inference import OptimizationReport


def optimize(
    model: str,
    *,
    weights: Path | None = None,
    batch_size: Whole = 1,
    image_size: OptionalWhole = None,
    no_measure: Switch = False,
    each: Switch = False,
    out: Path | None = None,
    no_tune_allocator: Switch = False,
) -> None:
    """Make a network ready for inference on this CPU, and say what that gains.

    Batch norms, activations, additions and SE blocks of anybody's network, known by what they
    compute, go into the convolutions around them (`senet.optimize` in Python). The original, also
    with channels last, and the result are timed on random images; the fastest is kept.

    Args:
        model: run folder or checkpoint; one of `senet models`; torchvision:NAME, timm:NAME or
            FILE.py:FUNCTION.
        weights: weights of the network, where it is given by name, or the word pretrained for
            released ones (senet models --pretrained lists them; default: fresh ones).
        batch_size: images that are timed.
        image_size: side of the images (default: the network's own).
        no_measure: time nothing, and keep the result whatever its speed.
        each: show each rewrite, and not only how many of which kind.
        out: file to write (.pt2, torch.export), checked against PyTorch; `senet predict` runs it.
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    if out is not None:
        check_file(out, "--out")
    prepare_process(tune_allocator=not no_tune_allocator)
    with importing():
        from senet.commands.optimize import optimize_network

    done = optimize_network(
        model,
        weights=weights,
        batch_size=batch_size,
        measure=not no_measure,
        **named(image_size=image_size, out=out),
    )
    if each:
        for line in str(done.report).splitlines():
            print(line)
    else:
        print_table(_kinds(done.report))
        for name, why in done.report.left:
            print(f"{name}: left as it is ({why})")
        for name, before, after in done.report.slower:
            print(f"{name}: left as it was ({before:.3g} ms, optimized {after:.3g} ms)")
        for line in done.report.summary():
            print(line)
    if done.written is not None:
        print(
            f"{done.written.path}: at most {done.written.difference:.1e} of the largest output "
            f"from the network on {done.written.inputs} batches"
        )


def _kinds(report: "OptimizationReport") -> "Table":
    """How many rewrites of each kind there are."""
    table = new_table("rewrite", right=("times",))
    for what, count in Counter(_kind(what) for _, what in report.fused).most_common():
        table.add_row(what, str(count))
    return table


def _kind(what: str) -> str:
    """A rewrite without the names in it."""
    what = re.sub(r"^(batch norm|constants) \S+ folded", r"\1 folded", what)
    what = re.sub(r"^squeeze of \S+ before", "squeeze before", what)
    return re.sub(r"^\S+ added to its weights", "parallel branch added to its weights", what)
