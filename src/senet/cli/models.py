"""`senet models`: the networks there are."""

from dataclasses import asdict
from json import dumps

from rich.table import Table

from senet.cli.options import Switch
from senet.cli.tables import new_table, print_table
from senet.errors import UserError
from senet.support.text import count


def models(
    pattern: str = "*",
    /,
    *,
    pretrained: Switch = False,
    table: Switch = False,
    json: Switch = False,
) -> None:
    """List networks with their parameters and multiply-adds at the default input size.

    Args:
        pattern: shell pattern of names, such as 'se_*' or '*_cifar'.
        pretrained: list the weights that others released for them instead; `pretrained` in the
            place of a checkpoint, with --model, takes the first ones of a network (best top-1,
            commercial use allowed), pretrained:TAG or --model NETWORK.TAG others.
        table: print tables 2 and 3 of the paper instead, with our recomputed columns beside.
        json: print JSON instead of a table.
    """
    if table:
        if pattern != "*" or json or pretrained:
            left = "--json" if json else "--pretrained" if pretrained else repr(pattern)
            raise UserError(f"--table shows the paper's networks: leave out {left}")
        print_table(_paper_table())
        return
    if pretrained:
        _released(pattern, json)
        return
    from senet.commands.models import network_sizes

    if json:
        print(dumps([asdict(network) for network in network_sizes(pattern)], indent=1))
        return
    found = new_table("model", right=("parameters", "multiply-adds", "input"))
    for network in network_sizes(pattern):
        found.add_row(
            network.name,
            f"{network.parameters:,}",
            count(network.multiply_adds),
            " × ".join(map(str, network.input_size)),
        )
    print_table(found)


def _released(pattern: str, json: bool) -> None:
    from senet.commands.models import released_weights

    found = released_weights(pattern)
    if json:
        print(dumps([asdict(each) | {"tag": each.tag} for each in found], indent=1))
        return
    table = new_table("weights", right=("top-1 %", "pixels"))
    table.add_column("licence")
    table.add_column("on the Hub", no_wrap=True)
    for each in found:
        table.add_row(
            f"{each.network}.{each.tag}",
            "" if each.top1 is None else f"{each.top1:.2f}",
            str(each.preprocessing["image_size"]),
            each.licence or "not said",
            each.repository or "no",
        )
    table.caption = (
        "top-1: ImageNet's validation images, at that many pixels (whose: --json)\n"
        "pretrained takes the first of a network; cc-by-nc only by its tag"
    )
    print_table(table)


def _paper_table() -> Table:
    from senet.models.paper import paper_differences, paper_rows

    table = Table(title="ImageNet, tables 2 and 3 of arXiv 1709.01507", title_justify="left")
    table.add_column("network", no_wrap=True)
    for kind in ("plain", "SE"):
        for column in ("top-1", "top-5", "GFLOPs", "ours", "params", "ours"):
            header = f"{kind} {column}" if column == "top-1" else column
            table.add_column(header, justify="right")
    for row in paper_rows():
        table.add_row(row.network, *row.plain, *row.se)
    explained = (
        "errors in % as published; GFLOPs are thousand millions of multiply-adds, parameters in "
        "millions with running statistics, counted as the paper does"
    )
    table.caption = "\n".join((explained, *paper_differences()))
    return table
