"""Stochastic depth (arXiv 1603.09382) for any network with residual branches."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from senet.anatomy.example import attempt
from senet.anatomy.recording import record
from senet.errors import UserError
from senet.insertion.places import branch_ends, unique
from senet.nn.hooks import without_remark


def drop_branches(model: nn.Module, rate: float, example: Any) -> list[str]:
    """Leave out each residual branch for some images of a training batch, by forward hooks.

    The probability rises linearly with depth up to `rate` at the last branch (equation 4 of the
    paper); what is kept is scaled by one over the probability to be kept. Tails that the operator
    fuses then run module by module, as with any hook.

    Args:
        model: the network, changed in place; its parameters keep their names.
        rate: probability of the last branch, in (0, 1).
        example: what the network takes.

    Returns:
        Names of the modules whose output is dropped, in the order of execution.

    Raises:
        UserError: no module returns the end of a residual branch.
    """
    arguments = (example,)
    with without_remark():
        trace = attempt(partial(record, model, arguments), arguments)
    sites = unique(branch_ends(trace))
    if not sites:
        raise UserError(
            f"drop_path {rate:g} leaves out residual branches, and {type(model).__name__} has none "
            "that ends in a module: leave it out"
        )
    for number, site in enumerate(sites, start=1):
        site.call.module.register_forward_hook(partial(_drop, rate * number / len(sites)))
    return [site.call.name for site in sites]


def _drop(rate: float, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return stochastic_depth(output, rate, "row", module.training)
