"""Rewriting a model's graph for inference: what follows a convolution goes into it.

The graph is torch.fx's: symbolic, so that batch and image size stay free. Each rewrite replaces
nodes by calls of the modules in `senet.inference.modules` and says so in the report.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from senet.inference.modules import FusedConv
from senet.inference.rewrites import (
    activations,
    additions,
    affine,
    branches,
    cleaning,
    convolutions,
    gates,
    shuffles,
    slices,
)
from senet.inference.rewrites.editor import Editor
from senet.inference.rewrites.editor import plain as plain

RELUS = (F.relu, torch.relu, F.relu_, torch.relu_)
ADDS = (operator.add, operator.iadd, torch.add)
# In the order in which they apply: each finds what those before have made.
_REWRITES = (
    cleaning.remove_dead,
    shuffles.recognise,
    convolutions.recognise,
    affine.norms,
    branches.merge,
    activations.recognise,
    affine.factors,
    activations.take_in,
    slices.of_convolutions,
    gates.means,
    gates.own_blocks,
    gates.products,
    cleaning.remove_dead,
    activations.take_in,  # of the layers of gates
    gates.squeeze_first,
    additions.take_in,
    activations.take_in,  # of what the two before have made
)


class Rewriter:
    """A traced copy of a model, and the rewrites in the order in which they apply.

    Args:
        model: model in evaluation mode; its parameters are read, not changed.
        example: an input of it, which tells the shapes; without it, SE blocks and means that are
            not of this package's or PyTorch's classes are left alone.
        given: names of the arguments that it is called with, where those are not just the ones
            without defaults; the others keep their defaults.

    Attributes:
        graph: the graph.
        module: the graph as a module.
        fused: for each rewrite the module that it starts from, and what was done.
        left: SE blocks that stay as they are, and why.
        closed: modules that torch.fx cannot follow and that are called as a whole, and why.
        gated: modules with a product of a map and gates that was rewritten, once for each product.

    Raises:
        TraceError: it writes into a part of a tensor that is read later; and whatever else a model
            raises that torch.fx cannot follow (`senet.inference.rewrites.tracing.FAILURES`).
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | None = None,
        given: Collection[str] | None = None,
    ) -> None:
        self._edit = Editor(model, example, given)
        cleaning.clean(self._edit)
        self.graph, self.module = self._edit.graph, self._edit.module
        self.fused, self.left = self._edit.fused, self._edit.left
        self.closed, self.gated = self._edit.closed, self._edit.gated

    @property
    def rank(self) -> int:
        """Dimensions of the inputs that the kernels take: 4, or 3 in networks of rows."""
        rows = any(isinstance(m, FusedConv) and m.dims == 1 for m in self.module.modules())
        return 3 if self._edit.dims == 1 and rows else 4

    def run(self) -> fx.GraphModule:
        """Apply all rewrites and return the graph as a module."""
        for rewrite in _REWRITES:
            rewrite(self._edit)
        cleaning.remove_dead(self._edit)
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()
        return self.module
