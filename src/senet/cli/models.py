"""`senet models`: the networks there are."""

from senet.units import print_table


def models(pattern: str = "*", /) -> None:
    """List networks with their parameters and multiply-adds at the default input size.

    Args:
        pattern: shell pattern of names, such as 'se_*' or '*_cifar'.
    """
    from senet.summary import model_table

    print_table(model_table(pattern))
