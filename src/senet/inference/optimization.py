"""`senet.optimize`: a trained model made ready for inference."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from senet import kernels
from senet.errors import SenetError
from senet.inference.blocks import outcomes
from senet.inference.measurement import called, left_to_pytorch, medians, outside
from senet.inference.modules import AsItIs
from senet.inference.part import OptimizedPart, refuse_layer
from senet.inference.report import CHANNELS_LAST, OPTIMIZED, ORIGINAL, OptimizationReport
from senet.inference.rewrite import Rewriter
from senet.inference.rewrites.tracing import FAILURES, reason_of
from senet.inference.rounding import allowed, difference
from senet.nn.block import NotScriptable
from senet.nn.hooks import give_forward_hooks, settle_weights, without_remark
from senet.support.copies import copied

# Difference from the original model, relative to the largest output, up to which nothing is asked:
# a trained network differs by some 1e-6 in float32. Beyond it rounding must explain the difference
# (`senet.inference.rounding`).
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_LOW_PRECISION = 0.1
# The original is kept where it takes less than this share of the time: the medians of two equal
# networks differ by up to 3%.
_CLEARLY = 0.97


class OptimizedModel(NotScriptable, nn.Module):
    """What `optimize` returns; called like the original model in evaluation mode.

    Args:
        network: the rewritten model; the original where that was faster (`report.kept`).
        report: what was done.
        argument: under which name the original takes its images.

    Attributes:
        network, report, argument: the arguments.
    """

    report: OptimizationReport

    def __init__(self, network: nn.Module, report: OptimizationReport, argument: str = "x") -> None:
        super().__init__()
        self.network = network
        self.report = report
        self.argument = argument

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_layer(self, name, value, "network")
        super().__setattr__(name, value)

    def repack(self) -> None:
        """Let the next call pack the weights anew, after edits that cannot be noticed.

        Those are writes that PyTorch does not count (through `parameter.data` or a NumPy view) and
        that leave both the largest and the smallest number of a weight as they were.
        """
        for module in self.modules():
            if isinstance(module, OptimizedPart):
                module.repack()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever `mode` is; also within a model that is trained.

        Parts of the original may be in the network as they were, with their dropout and batch
        norms.
        """
        del mode
        return super().train(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`; the images may be named as the original names them.

        Raises:
            TypeError: any other argument.
        """
        # Here, as torch.fx and torch.export read the names that forward has.
        if unknown := [name for name in kwargs if name not in ("x", self.argument)]:
            raise TypeError(
                f"an optimized network takes its images alone ({self.argument}), got an "
                f"unexpected keyword argument {unknown[0]!r}"
            )
        if len(args) + len(kwargs) > 1:
            raise TypeError(
                f"an optimized network takes its images alone ({self.argument}), got "
                f"{len(args) + len(kwargs)} arguments"
            )
        return super().__call__(*args, *kwargs.values())

    def forward(self, x: Tensor) -> Any:
        """What the original model returns for images x, (N,C,H,W), (N,C,L) or (N,C,D,H,W)."""
        return self.network(x)


class _Original(nn.Module):
    """A network as it was, because it is faster so.

    Args:
        network: the network; with `channels_last` its weights are laid out so.
        channels_last: whether its images are, too.
    """

    def __init__(self, network: nn.Module, channels_last: bool) -> None:
        super().__init__()
        if channels_last:
            for parameter in network.parameters():
                if parameter.ndim == 4:  # others have no such format
                    parameter.data = parameter.contiguous(memory_format=torch.channels_last)
        self.original = network
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Any:
        """What the network returns for images (N,C,H,W)."""
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.original(x)


@dataclass
class _Part:
    """A part that was optimized for itself, because torch.fx cannot trace what is around it.

    Attributes:
        name: its dotted name.
        parent: the module that holds it.
        key: under which name.
        before: the part as it was.
        after: the part optimized.
        example: an input of it.
    """

    name: str
    parent: nn.Module
    key: str
    before: nn.Module
    after: OptimizedPart
    example: Tensor


class _Optimizer:
    """Rewrites a network, and where it cannot be traced, its parts.

    Args:
        model: a copy of the network, which is taken apart.
        example: images.

    Attributes:
        fused, left: as in the report.
        gated: modules with a product that was rewritten.
        parts: what was optimized for itself.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.fused: list[tuple[str, str]] = []
        self.left: list[tuple[str, str]] = []
        self.gated: list[str] = []
        self.parts: list[_Part] = []
        self._model, self._example = model, example
        self._calls: dict[str, _Call] | None = None

    def run(self) -> nn.Module:
        """The network rewritten."""
        return self._optimized(self._model, "")

    def _optimized(self, model: nn.Module, name: str) -> nn.Module:
        """The model as an `OptimizedPart`, or with those of its children replaced that allow it."""
        call = self._call_of(name)
        example = None if call is None else call.image
        try:
            rewriter = Rewriter(model, example, None if call is None else call.given(model))
        except FAILURES as error:
            why = f"torch.fx cannot trace it: {reason_of(error)}"
            self.left.append((name or type(model).__name__, why))
            for key, child in model.named_children():
                self._replace(model, key, child, joined(name, key))
            return model
        graph = rewriter.run()
        for said, of in ((self.fused, rewriter.fused), (self.left, rewriter.left)):
            said += [(joined(name, what), how) for what, how in of]
        self.gated += [joined(name, path) for path in rewriter.gated]
        for path in rewriter.closed:
            parent, _, key = path.rpartition(".")
            held = graph.get_submodule(parent)
            self._replace(held, key, graph.get_submodule(path), joined(name, path))
        part = OptimizedPart(graph, rewriter.rank)
        give_forward_hooks(model, part)
        return part

    def _replace(self, parent: nn.Module, key: str, child: nn.Module, name: str) -> None:
        """Put the optimized form of a child in its place."""
        if next(child.parameters(), None) is None or _is_leaf(child) or isinstance(child, AsItIs):
            return
        new = self._optimized(child, name)
        if new is child:
            return
        setattr(parent, key, new)
        why_not = self._complaint(parent, name.rpartition(".")[0])
        if why_not is not None:
            setattr(parent, key, child)
            self.left.append((name, why_not))
            return
        call = self._call_of(name)
        if isinstance(new, OptimizedPart) and call is not None and call.image is not None:
            self.parts.append(_Part(name, parent, key, child, new, call.image))

    def _complaint(self, parent: nn.Module, name: str) -> str | None:
        """Why a module does not run any more, as it reads more of a child than its result."""
        call = self._call_of(name)
        if call is None:
            return None
        try:
            with torch.no_grad():
                call.repeat(parent)
        except FAILURES as error:
            return f"the module around it reads its insides: {reason_of(error)}"
        return None

    def _call_of(self, name: str) -> _Call | None:
        """The last call of a module; None where it is not called."""
        if not name:
            return _Call((self._example,), {})
        if self._calls is None:
            self._calls = _calls_in(self._model, self._example)
        return self._calls.get(name)


@dataclass(frozen=True)
class _Call:
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def image(self) -> Tensor | None:
        """The one tensor that is given; None where it is called with more or other things."""
        (x,) = self.args if len(self.args) == 1 and not self.kwargs else (None,)
        return x if isinstance(x, Tensor) and x.is_floating_point() else None

    def given(self, module: nn.Module) -> set[str]:
        """Names of the arguments, in which values that are their defaults do not count."""
        signature = inspect.signature(module.forward)
        given = signature.bind(*self.args, **self.kwargs).arguments
        return {n for n, value in given.items() if value is not signature.parameters[n].default}

    def repeat(self, module: nn.Module) -> None:
        """Call a module so."""
        copies = tree_map_only(Tensor, torch.clone, (self.args, self.kwargs))
        module(*copies[0], **copies[1])


@torch.no_grad()
def _calls_in(model: nn.Module, example: Tensor) -> dict[str, _Call]:
    """The last call of each module within a model, with random numbers in place of its images'."""
    found: dict[str, _Call] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = _Call(*tree_map_only(Tensor, _without_numbers, (args, kwargs)))

        return note

    handles = [
        m.register_forward_pre_hook(noting(name), with_kwargs=True)
        for name, m in model.named_modules()
    ]
    try:
        with without_remark():
            model(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    filled = partial(_with_numbers, device=example.device)
    return {
        name: _Call(*tree_map_only(Tensor, filled, (call.args, call.kwargs)))
        for name, call in found.items()
    }


def _without_numbers(x: Tensor) -> Tensor:
    """A floating tensor without data, which need not be held; others as they are."""
    return x.to("meta") if x.is_floating_point() else x.clone()


def _with_numbers(x: Tensor, device: torch.device) -> Tensor:
    return torch.randn_like(x, device=device) if x.device.type == "meta" else x


def joined(outer: str, inner: str) -> str:
    """Dotted name of a module within another one."""
    return f"{outer}.{inner}" if outer and inner else outer or inner


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module alone offers nothing to fuse."""
    return next(module.children(), None) is None


def _undo_slower(parts: list[_Part]) -> list[tuple[str, float, float]]:
    """Put those parts back that were faster before: name, and milliseconds before and after."""
    slower = []
    for part in parts:
        times = medians(
            {
                ORIGINAL: called(part.before, part.example),
                OPTIMIZED: called(part.after, part.example),
            }
        )
        if times[ORIGINAL] < _CLEARLY * times[OPTIMIZED]:
            setattr(part.parent, part.key, part.before)
            slower.append((part.name, times[ORIGINAL], times[OPTIMIZED]))
    return slower


def _check_example(example: object) -> None:
    if not isinstance(example, Tensor):
        kind = type(example).__name__
        raise TypeError(f"example_input must be a tensor (N,C,H,W) or (N,C,L), got {kind}")


def optimize(model: nn.Module, example_input: Tensor, *, measure: bool = True) -> OptimizedModel:
    """A copy of the model for inference: as exact as the original, and never slower.

    Batch norms are folded into convolutions; an SE block's squeeze is taken before the last
    convolution of its branch, whose output is then scaled, added to the shortcut and passed
    through its activation while it is written (docs/algebra.md, section 3). No class names count:
    batch norms, activations and SE blocks are known by what they compute, in any library's
    network. On the CPU in float32 what the kernels know runs in C++ with buffers that are planned
    once per input shape and used again; elsewhere the same graph runs in PyTorch, also under
    torch.compile and torch.export. On a GPU what follows a convolution (bias, gates, shortcut,
    ReLU) is one Triton kernel, and under torch.compile one of the compiler's; from the second call
    with an input shape on, the network is launched as one CUDA graph.

    The result takes any batch and image size, can be called by any number of threads at the same
    time, can be pickled, copied and saved, and has no gradients to its weights unless they ask for
    some (`requires_grad_`), which takes it off the kernels. It does not train: `train()` leaves it
    in evaluation mode. Its own weights may be edited or loaded; the next call packs them
    anew (`OptimizedModel.repack` says which edits it cannot notice).

    Args:
        model: any module that takes images (N,C,H,W). It stays as it is. What cannot be rewritten
            is left alone, and the report says so. Networks of one spatial dimension, (N,C,L), run
            as maps of one row; those of three keep PyTorch's convolutions, with batch norms folded.
            It may return tensors in tuples, named tuples, lists, dicts and dataclasses.
        example_input: an input of it, to compare both models on; the kernels take inputs of as many
            dimensions.
        measure: whether to time both on the example, the original with channels last too, and to
            keep what is fastest, part by part where the model could not be traced as a whole; takes
            some ten runs of each. False keeps the optimized network, whatever its speed.

    Returns:
        The optimized model in evaluation mode; `report` tells what was fused, and what it gained.

    Raises:
        TypeError: `example_input` is no tensor.
        UserError: the model cannot be copied, as with `torch.nn.utils.weight_norm` or pruning.
        SenetError: the outputs for `example_input` differ by more than rounding: in float32 by more
            than 1e-4 of the largest, and than ten times the original's own distance from float64.
    """
    _check_example(example_input)
    example_input = example_input.clone()  # a network may normalise its images in place
    original = copied(model).eval()
    working = copy.deepcopy(original).requires_grad_(False)
    settle_weights(working)
    optimizer = _Optimizer(working, example_input)
    network = optimizer.run().eval()
    # One run for both: a second one would capture a CUDA graph.
    with torch.no_grad(), left_to_pytorch(network) as operations:
        wanted = original(example_input.clone())
        found = difference(network(example_input.clone()), wanted)
    tolerance = _TOLERANCE.get(example_input.dtype, _LOW_PRECISION)
    if not found <= tolerance and not found <= allowed(original, example_input, wanted, tolerance):
        raise SenetError(
            f"the optimized model's output differs from the original's by {found:.1e} relative"
            " for example_input; the model computes with non-finite numbers, or this is a bug"
        )
    isa = kernels.instruction_set()
    report = OptimizationReport(
        fused=tuple(optimizer.fused),
        left=tuple(optimizer.left),
        difference=found,
        kernels=isa or f"none ({kernels.MISSING})",
        operations=dict(operations.most_common()),
        blocks=outcomes(original, example_input, optimizer.gated, optimizer.left),
    )
    if measure:
        slower = tuple(_undo_slower(optimizer.parts))
        network, report = _fastest(original, network, example_input, replace(report, slower=slower))
    optimized = OptimizedModel(network, report, _argument(model)).eval()
    for attribute in ("config", "input_size", "min_input_size", "num_features", "preprocessing"):
        # A layer or a tensor of that name belongs to the network, which has it in its own form.
        value = getattr(model, attribute, None)
        if hasattr(model, attribute) and not isinstance(value, nn.Module | Tensor):
            setattr(optimized, attribute, copy.deepcopy(value))
    return optimized


def _argument(model: nn.Module) -> str:
    """Under which name a model takes its images: its first argument."""
    if isinstance(model, OptimizedModel):
        return model.argument
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    named = first is not None and first.kind is first.POSITIONAL_OR_KEYWORD
    return first.name if first is not None and named else "x"


def _fastest(
    original: nn.Module, network: nn.Module, x: Tensor, report: OptimizationReport
) -> tuple[nn.Module, OptimizationReport]:
    """The network that is fastest on an example, and the report with the times."""
    original.requires_grad_(False)
    networks: dict[str, nn.Module] = {ORIGINAL: _Original(original, channels_last=False)}
    if x.ndim == 4:
        networks[CHANNELS_LAST] = _Original(copy.deepcopy(original), channels_last=True)
    networks[OPTIMIZED] = network
    times = medians({name: called(each, x) for name, each in networks.items()})
    kept = min(times, key=lambda name: times[name])
    if times[kept] >= _CLEARLY * times[OPTIMIZED]:
        kept = OPTIMIZED
    shares = outside(network, x)
    return networks[kept], replace(report, milliseconds=times, kept=kept, outside=shares)
