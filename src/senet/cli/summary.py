"""`senet summary`: layers of a network or of one SE block."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from senet.cli.options import (
    NO_NETWORK,
    NO_SE,
    NetworkFlags,
    OptionalWhole,
    SEFlags,
    Switch,
    WholeNumbers,
    given,
    is_place,
    named,
)
from senet.cli.tables import new_table, print_table, table_width
from senet.errors import UserError
from senet.support.text import count

if TYPE_CHECKING:
    from senet.anatomy import Description
    from senet.commands.summary import BlockSummary
    from senet.models.paper import StageCost


def summary(
    network_name: Annotated[str | None, Parameter(name="NAME")] = None,
    /,
    *,
    model: str | None = None,
    se_blocks: Annotated[Switch, Parameter(name="--se")] = False,
    input_shape: Annotated[WholeNumbers, Parameter(name="--input")] = None,
    num_classes: OptionalWhole = None,
    channels: OptionalWhole = None,
    json: Switch = False,
    se: SEFlags = NO_SE,
    network: NetworkFlags = NO_NETWORK,
) -> None:
    """Show layers, output shapes, parameters and multiply-adds of a network, or of an SE block.

    Below the layers of a network: the same by stage, and what SE adds to each. With --se the SE
    blocks of any network, found by what they compute: what each squeezes, its layers and gates,
    and its share of the multiply-adds and of the time of one image, run operation by operation.

    Args:
        network_name: a network (`senet models` lists them), 'block' for one SE block, or a
            checkpoint; with --se also torchvision:NAME, timm:NAME, or FILE.py:FUNCTION.
        model: the same.
        se_blocks: show the SE blocks of the network and nothing else.
        input_shape: channels, height and width of the input (default: the network's own).
        num_classes: classes of the network (default: 1000, 10 for CIFAR networks).
        channels: channels of the block; only with 'block'.
        json: print the figures by stage as JSON instead; for a network alone.
    """
    from senet.commands.summary import (
        summarize_excitations,
        summarize_network,
        summary_of_block,
    )

    options = given(se) | given(network)
    if (network_name is None) == (model is None):
        raise UserError("give one network: by its name, or by --model")
    model = str(network_name or model)
    name = Path(model) if model != "block" and is_place(model) else model
    if json and (se_blocks or model == "block"):
        raise UserError("--json is for the stages of a network: leave it out")
    if se_blocks:
        options |= named(channels=channels)
        blocks = summarize_excitations(name, input_shape, num_classes, options)
        if blocks:
            print_table(_excitation_table(blocks))
        print(_sums(model, blocks))
    elif model == "block":
        options |= named(num_classes=num_classes)
        print_table(_block_table(summary_of_block(channels, input_shape, options)))
    else:
        options |= named(channels=channels)
        found = summarize_network(name, input_shape, num_classes, options)
        if json:
            plain = {key: value for key, value in asdict(found).items() if key != "layers"}
            print(dumps(plain, indent=1))
            return
        print(fitted(found.layers, table_width()))
        print_table(_stage_table(model, found.stages))
        print(
            f"{model} at {' × '.join(map(str, found.shape))}: {found.parameters:,} parameters, "
            f"{count(found.multiply_adds)} multiply-adds"
        )


def fitted(layers: str, width: int) -> str:
    """A table of layers in that many characters: narrow columns, then shortened names.

    Args:
        layers: lines of columns that begin beneath those of the header, and rulers of `=`.
        width: characters; from 60 on it is kept to.
    """
    lines = layers.splitlines()
    if max(map(len, lines)) <= width:
        return layers
    header = next(line for line in lines if line.startswith("Layer"))
    starts = [match.start() for match in re.finditer(r"(?<!\S)\S+(?: \S+)*", header)]
    rows = [
        [line[start:end].rstrip() for start, end in pairwise([*starts, None])]
        for line in lines
        if not line.startswith("=")
    ]
    names, *others = zip(*rows, strict=True)
    sizes = [max(map(len, column)) for column in others]
    room = max(width - sum(sizes) - 2 * len(sizes), 12)
    room = min(room, max(map(len, names)))
    shown = iter(
        "  ".join(
            [
                (name if len(name) <= room else name[: room - 1] + "…").ljust(room),
                *(cell.ljust(size) for cell, size in zip(cells, sizes, strict=True)),
            ]
        ).rstrip()
        for name, *cells in rows
    )
    ruler = "=" * (room + sum(sizes) + 2 * len(sizes))
    return "\n".join(ruler if line.startswith("=") else next(shown) for line in lines)


def _megabytes(size: int) -> str:
    """Bytes in MB of 2**20 bytes with two decimals, as layer tables are wont to give them."""
    return f"{size / 2**20:.2f} MB"


def _block_table(summary: "BlockSummary") -> Table:
    """The layers of an SE block and their sums."""
    block = summary.block
    title = f"SqueezeExcitation: {block.channels} channels, hidden width {block.hidden}"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("layer", "total")
    table.add_column("kind", "", no_wrap=True)
    table.add_column("output shape", "", no_wrap=True)
    table.add_column("parameters", f"{summary.parameters:,}", justify="right")
    table.add_column("size", _megabytes(summary.forward_bytes), justify="right")
    table.add_row("input", "", str(list(summary.input_shape)), "", _megabytes(summary.input_bytes))
    for row in summary.rows:
        shape = str(list(row.shape))
        table.add_row(row.name, row.kind, shape, f"{row.parameters:,}", _megabytes(row.size))
    table.caption = (
        f"all parameters trainable, {_megabytes(summary.parameter_bytes)}; "
        f"input {_megabytes(summary.input_bytes)}"
    )
    return table


def _excitation_table(blocks: "Sequence[Description]") -> Table:
    """A row an SE block."""
    right = ["stage", "parameters", "of multiply-adds (%)", "of time (%)"]
    table = new_table("block", "scales", "map", "squeeze", "program", "gate", right=right)
    for block in blocks:
        table.add_row(
            f"{block.name} × {block.calls}" if block.calls > 1 else block.name,
            block.scales,
            " × ".join(map(str, (block.channels, *block.places))),
            block.squeeze,
            block.program or "–",
            block.gate if block.limits is None else f"{block.gate} {_interval(block.limits)}",
            f"{block.stage}",
            f"{block.parameters:,}",
            f"{100 * block.multiply_adds_share:.3f}",
            "" if block.time_share is None else f"{100 * block.time_share:.2f}",
        )
    return table


def _interval(limits: tuple[float, float]) -> str:
    return f"{limits[0]:g}…{limits[1]:g}"


def _sums(name: str, blocks: "Sequence[Description]") -> str:
    """What all SE blocks of a network take together."""
    parameters = sum(block.parameters for block in blocks)
    adds = sum(block.multiply_adds_share for block in blocks)
    text = f"{name}: {len(blocks)} SE block{'' if len(blocks) == 1 else 's'}"
    if blocks:
        text += f", {parameters:,} parameters, {100 * adds:.2f}% of the multiply-adds"
        text += f", {100 * sum(block.time_share or 0 for block in blocks):.1f}% of the time"
    return text


def _stage_table(name: str, stages: "Sequence[StageCost]") -> Table:
    """Parameters and multiply-adds by stage; with SE, what SE adds to each."""
    right = ["parameters", "multiply-adds"]
    if stages[0].se is not None:
        right += ["SE adds parameters", "SE adds multiply-adds"]
    table = new_table("part", right=right, title=f"{name} by stage", title_justify="left")
    rows = [(each.part, (each.parameters, each.multiply_adds, *(each.se or ()))) for each in stages]
    for part, row in rows:
        table.add_row(part, *(f"{value:,}" for value in row))
    table.add_section()
    sums = (sum(column) for column in zip(*(row for _, row in rows), strict=True))
    table.add_row("all", *(f"{value:,}" for value in sums))
    return table
