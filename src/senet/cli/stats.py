"""`senet stats`: what the training images of a data set are like."""

from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING

from rich.table import Table

from senet.cli.options import NO_DATA, DataFlags, Switch, given
from senet.cli.tables import new_table, print_table
from senet.support.text import printable

if TYPE_CHECKING:
    from senet.data.statistics import Statistics

SHOWN_CLASSES = 20


def stats(data: str, *, flags: DataFlags = NO_DATA, json: Switch = False) -> None:
    """Measure the training images: pixels, sizes and classes.

    Mean and deviation are of each channel, of images resized and cropped as for an evaluation, in
    units of full intensity (255 or 65535; floating-point pixels as they are); of more than 10,000
    images so many are opened, evenly spread.
    `senet train --normalisation measured` trains with them.

    Args:
        data: what senet train --data takes.
        json: print JSON instead of tables.
    """
    from senet.data.arrays import WORDS
    from senet.data.statistics import measure
    from senet.training.data import open_named

    opened = open_named(data, given(flags))
    found = measure(opened)
    if json:
        print(dumps({"data": printable(opened.name), **asdict(found)}, indent=1))
        return
    print_table(_pixels(found))
    smallest, largest = (f"{size[0]}×{size[1]}" for size in (found.smallest, found.largest))
    print(
        f"{found.measured:,} of {found.images:,} training images, {smallest} to {largest} pixels, "
        f"{len(found.mean)} channel{'s' * (len(found.mean) > 1)} of {WORDS[found.depth]}"
    )
    print_table(_classes(found))


def _pixels(found: "Statistics") -> Table:
    table = new_table("channel", right=("mean", "std"))
    digits = "5g" if found.depth == "float" else "4f"
    known = {1: ("grey",), 3: ("red", "green", "blue")}
    names = known.get(len(found.mean)) or tuple(str(n + 1) for n in range(len(found.mean)))
    for name, mean, std in zip(names, found.mean, found.std, strict=True):
        table.add_row(name, *(f"{value:.{digits}}" for value in (mean, std)))
    return table


def _classes(found: "Statistics") -> Table:
    ordered = sorted(found.counts.items(), key=lambda item: -item[1])
    table = new_table("class", right=("images", "%"))
    half = SHOWN_CLASSES // 2
    shown = ordered if len(ordered) <= SHOWN_CLASSES else [*ordered[:half], *ordered[-half:]]
    for name, count in shown:
        table.add_row(name, f"{count:,}", f"{100 * count / found.measured:.1f}")
    if len(shown) < len(ordered):
        table.caption = f"the {half} largest and the {half} smallest of {len(ordered)} classes"
    return table
