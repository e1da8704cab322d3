"""`senet models`: the networks there are."""

from senet.cli.options import Switch
from senet.errors import UserError
from senet.support.text import print_table


def models(pattern: str = "*", /, *, table: Switch = False) -> None:
    """List networks with their parameters and multiply-adds at the default input size.

    Args:
        pattern: shell pattern of names, such as 'se_*' or '*_cifar'.
        table: print tables 2 and 3 of the paper instead, with our recomputed columns beside.
    """
    if table:
        if pattern != "*":
            raise UserError(f"--table shows the paper's networks: leave out {pattern!r}")
        from senet.models.paper import paper_table

        print_table(paper_table())
        return
    from senet.commands.summary import model_table

    print_table(model_table(pattern))
