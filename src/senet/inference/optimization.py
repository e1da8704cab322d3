"""`senet.optimize`: a trained model made ready for inference."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet import kernels
from senet.errors import SenetError, UserError
from senet.inference.plans import Plans
from senet.inference.rewrite import Rewriter
from senet.inference.rewrites.tracing import FAILURES, reason_of
from senet.inference.rounding import allowed, difference

# Difference from the original model, relative to the largest output, up to which nothing is asked:
# a trained network differs by some 1e-6 in float32. Beyond it rounding must explain the difference
# (`senet.inference.rounding`).
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_LOW_PRECISION = 0.1
# Held while a network's `Plans` are made, which threads that call it at the same time share.
_MAKING = threading.Lock()


@dataclass(frozen=True)
class OptimizationReport:
    """What `optimize` did.

    Attributes:
        fused: per rewrite the module it starts from, and what was done.
        left: modules that were left as they are, and why.
        difference: largest difference of the outputs from the original model's for the example,
            relative to the largest output.
        kernels: instruction set of the C++ kernels, or the reason why there are none.
    """

    fused: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    difference: float
    kernels: str

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.fused]
        lines += [f"{name}: left as it is ({why})" for name, why in self.left]
        lines.append(f"largest relative difference from the original: {self.difference:.1e}")
        lines.append(f"C++ kernels: {self.kernels}")
        return "\n".join(lines)


class OptimizedPart(nn.Module):
    """A rewritten graph that runs on the C++ kernels where it can and in PyTorch elsewhere.

    The kernels take one float32 tensor (N,C,H,W) on the CPU outside of autograd; anything else, and
    any graph capture (torch.compile, torch.export, a trace), gets the same graph in PyTorch. Any
    number of threads may call it at the same time. Weights that were edited since they were packed
    are packed anew (see `senet.inference.weights.Watch`).

    Args:
        graph: the rewritten graph.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph
        self._plans: Plans | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without programs and packed weights: they are made anew where they are needed."""
        return {**self.__dict__, "_plans": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedPart:
        return OptimizedPart(copy.deepcopy(self.graph_module, memo)).train(self.training)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_layer(self, name, value, "graph_module")
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> OptimizedPart:
        self.repack()  # weights move or change their type: what was packed of them may go
        super()._apply(*args, **kwargs)
        return self

    def repack(self) -> None:
        """Let the next call pack the weights anew."""
        self._plans = None

    def forward(self, *inputs: Any) -> Any:
        """What the original model returns for the same inputs."""
        if len(inputs) == 1 and self._takes(inputs[0]):
            plans = self._current_plans()
            if not (torch.is_grad_enabled() and plans.watch.wants_gradients()):
                return plans.run(inputs[0])
        return self.graph_module(*inputs)

    def _current_plans(self) -> Plans:
        plans = self._plans
        if plans is None or plans.watch.changed():
            with _MAKING:
                if self._plans is plans or self._plans is None:  # else another thread was faster
                    self._plans = Plans(self.graph_module)
                plans = self._plans
        return plans

    def _takes(self, x: Any) -> bool:
        """Whether the kernels can run for this input."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or kernels.MISSING:
            return False
        if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        if x.ndim != 4 or x.numel() == 0 or (torch.is_grad_enabled() and x.requires_grad):
            return False
        weight = next(self.graph_module.parameters(), x)
        return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _refuse_layer(module: nn.Module, name: str, value: object, own: str) -> None:
    """Refuse a layer or parameter set where the optimized network would not use it.

    Raises:
        UserError: it is one.
    """
    if isinstance(value, nn.Module | nn.Parameter) and name != own:
        raise UserError(
            f"an optimized network has no {name} to replace (its layers are rewritten): set it in "
            "the original network and optimize that again"
        )


class OptimizedModel(nn.Module):
    """What `optimize` returns; called like the original model in evaluation mode.

    Attributes:
        report: what was done.
        network: the rewritten model.
    """

    report: OptimizationReport

    def __init__(self, network: nn.Module, report: OptimizationReport) -> None:
        super().__init__()
        self.network = network
        self.report = report

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_layer(self, name, value, "network")
        super().__setattr__(name, value)

    def repack(self) -> None:
        """Let the next call pack the weights anew, after edits that cannot be noticed.

        Those are writes that PyTorch does not count (through `parameter.data` or a NumPy view) and
        that leave both the largest and the smallest number of a weight as they were.
        """
        for module in self.modules():
            if isinstance(module, OptimizedPart):
                module.repack()

    def forward(self, x: Tensor) -> Any:
        """What the original model returns for images x (N,C,H,W)."""
        return self.network(x)


def _optimized(
    model: nn.Module, name: str, fused: list[tuple[str, str]], left: list[tuple[str, str]]
) -> nn.Module:
    """The model as an `OptimizedPart`, or with those of its children replaced that allow it."""
    try:
        rewriter = Rewriter(model)
    except FAILURES as error:
        reason = reason_of(error)
        left.append((name or type(model).__name__, f"torch.fx cannot trace it: {reason}"))
        for child_name, child in model.named_children():
            if next(child.parameters(), None) is not None and not _is_leaf(child):
                path = f"{name}.{child_name}" if name else child_name
                setattr(model, child_name, _optimized(child, path, fused, left))
        return model
    graph = rewriter.run()
    for said, of in ((fused, rewriter.fused), (left, rewriter.left)):
        said += [(f"{name}.{what}" if name else what, how) for what, how in of]
    return OptimizedPart(graph)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module alone offers nothing to fuse."""
    return next(module.children(), None) is None


def _check_example(example: object) -> None:
    if not isinstance(example, Tensor):
        kind = type(example).__name__
        raise TypeError(f"example_input must be a tensor (N,C,H,W), got {kind}")


def optimize(model: nn.Module, example_input: Tensor) -> OptimizedModel:
    """A copy of the model for inference: as exact as the original, faster.

    Batch norms are folded into convolutions; an SE block's squeeze is taken before the last
    convolution of its branch, whose output is then scaled, added to the shortcut and passed
    through ReLU while it is written (docs/algebra.md, section 3). On the CPU in float32 the whole
    network runs in C++ kernels with buffers that are planned once per input shape and used again;
    elsewhere the same graph runs in PyTorch, also under torch.compile and torch.export. On a GPU
    what follows a convolution (bias, gates, shortcut, ReLU) is one Triton kernel, and under
    torch.compile one of the compiler's.

    The result takes any batch and image size, can be called by any number of threads at the same
    time, can be pickled, copied and saved, and has no gradients to its weights unless they ask for
    some (`requires_grad_`), which takes it off the kernels. It does not train: dropout is gone and
    batch norms are constants. Its own weights may be edited or loaded; the next call packs them
    anew (`OptimizedModel.repack` says which edits it cannot notice).

    Args:
        model: any module that takes images (N,C,H,W); best known are those of `create_model`.
            It stays as it is. What cannot be rewritten is left alone, and the report says so.
            It may return tensors in tuples, named tuples, lists, dicts and dataclasses.
        example_input: an input of it, to compare both models on.

    Returns:
        The optimized model in evaluation mode; `report` tells what was fused.

    Raises:
        TypeError: `example_input` is no tensor.
        SenetError: the outputs for `example_input` differ by more than rounding: in float32 by more
            than 1e-4 of the largest, and than ten times the original's own distance from float64.
    """
    _check_example(example_input)
    original = copy.deepcopy(model).eval()
    fused: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    working = copy.deepcopy(original).requires_grad_(False)
    network = _optimized(working, "", fused, left).eval()
    with torch.no_grad():
        wanted = original(example_input)
        found = difference(network(example_input), wanted)
    tolerance = _TOLERANCE.get(example_input.dtype, _LOW_PRECISION)
    if not found <= tolerance and not found <= allowed(original, example_input, wanted, tolerance):
        raise SenetError(
            f"the optimized model's output differs from the original's by {found:.1e} relative"
            " for example_input; the model computes with non-finite numbers, or this is a bug"
        )
    isa = kernels.instruction_set()
    report = OptimizationReport(
        tuple(fused), tuple(left), found, isa or f"none ({kernels.MISSING})"
    )
    optimized = OptimizedModel(network, report).eval()
    for attribute in ("config", "input_size", "min_input_size", "num_features", "preprocessing"):
        if hasattr(model, attribute):
            setattr(optimized, attribute, copy.deepcopy(getattr(model, attribute)))
    return optimized
