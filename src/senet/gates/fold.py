"""Fold gates that do not depend on the input into the layers around them, and measure the effect.

A gate that has the same value for every image is a constant factor, which batch norm or convolution
weights can take in: docs/algebra.md, section 4. ASR (arXiv 2304.06345) trains blocks for this; here
the gates of an already trained network are measured, folded and judged by the network's accuracy.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.anatomy.recognition import excitations
from senet.anatomy.tracing import Trace, record
from senet.errors import UserError
from senet.gates.blocks import ConstantScale, as_partial, keep_channels
from senet.gates.record import fingerprint
from senet.gates.statistics import BlockStatistics, GateStatistics
from senet.gates.targets import edits_after, edits_before
from senet.insertion.replace import replace_block
from senet.models.cost import count_multiply_adds, count_parameters

SMALLEST_FACTOR = 1e-3  # a partly folded block divides its first layer's weights by the constants


@dataclass(frozen=True)
class FoldedBlock:
    """What became of one SE block.

    Attributes:
        name: of the block.
        channels: C.
        folded: channels whose gate became a constant.
        kind: "removed", "partial", "constant" (a factor that no layer could take in) or "kept".
        into: "before" or "after" the block, or "" where nothing was moved.
        loss_bound: predicted bound on what is lost: Σ over folded channels of the mean of
            |s − mean(s)|·|v|, as a share of Σ over all channels of mean |s·v|'s bound.
        why: why channels below the tolerance were not folded, or "".
    """

    name: str
    channels: int
    folded: int
    kind: str
    into: str
    loss_bound: float
    why: str = ""


@dataclass(frozen=True)
class Measured:
    """A network on data.

    Attributes:
        parameters: number of parameters.
        multiply_adds: of one image.
        top1: %, None without data.
        loss: cross-entropy in nats, None without data.
        images_per_second: forward passes only, None without data.
    """

    parameters: int
    multiply_adds: int
    top1: float | None = None
    loss: float | None = None
    images_per_second: float | None = None


@dataclass(frozen=True)
class FoldReport:
    """What `fold_gates` did.

    Attributes:
        model: the folded network, a copy; the original is untouched.
        blocks: what became of each block.
        before: the original, measured.
        after: the folded network, measured in the same pass over the data.
        restored: blocks that were folded at first and put back because of `max_drop`.
        tolerance: largest standard deviation of a folded gate.
        structure: what `restructure` needs to give a fresh network this structure; JSON-able.
    """

    model: nn.Module
    blocks: tuple[FoldedBlock, ...]
    before: Measured
    after: Measured
    restored: tuple[str, ...]
    tolerance: float
    structure: dict[str, dict[str, Any]]

    @property
    def drop(self) -> float | None:
        """Top-1 lost, in percentage points; negative where the folded network is better."""
        if self.before.top1 is None or self.after.top1 is None:
            return None
        return self.before.top1 - self.after.top1


def fold_gates(
    model: nn.Module,
    statistics: GateStatistics,
    *,
    tolerance: float = 0.01,
    loader: Iterable[Any] | None = None,
    max_drop: float | None = None,
    partial: bool = True,
    example_input: Tensor | None = None,
    tried: Callable[[int, float], None] | None = None,
) -> FoldReport:
    """Make gates that hardly depend on the input constants, and move them into other layers.

    A gate whose standard deviation over the recorded images is at most `tolerance` becomes its
    mean. A block all of whose gates fold is removed: its constants go into the batch norm or
    convolution before it, else into the convolutions after it, else stay as one factor a channel.
    A block of which some gates fold keeps a smaller second layer. Works on networks of this
    package, on inserted blocks, and on SE blocks of torchvision and timm.

    Args:
        model: the network; untouched, a copy is folded.
        statistics: of this very network, from `record_gates`.
        tolerance: in units of the gate, at least 0; 0 folds exactly constant gates only.
        loader: batches (images (N,C,H,W), class numbers (N,)) to judge both networks on; it is
            gone through once for each attempt.
        max_drop: most top-1 in percentage points that may be lost; needs `loader`. While more is
            lost, the block with the largest predicted harm is put back, so that what does least
            harm stays folded. The last resort is the original.
        partial: also fold some gates of a block where others move. That saves parameters, but
            such a block no longer runs in the fused operator.
        example_input: what to trace the network with; by default zeros of `model.input_size`, or
            the first image of the loader.
        tried: hears of the number of folded blocks and the drop of each attempt.

    Raises:
        UserError: statistics of another network, no labels, or an argument out of range.
    """
    if not tolerance >= 0:
        raise UserError(f"tolerance must be at least 0, got {tolerance}")
    if max_drop is not None and loader is None:
        raise UserError("max_drop needs data to measure the accuracy on: pass loader=…")
    if max_drop is not None and not max_drop >= 0:
        raise UserError(f"max_drop must be at least 0 percentage points, got {max_drop}")
    present = excitations(model)
    if list(present) != list(statistics.blocks) or statistics.fingerprint != fingerprint(model):
        raise UserError(
            "the statistics are of another model, or of this one before it was trained further; "
            "record them anew with senet.record_gates"
        )
    example = _example(model, example_input, loader)
    candidates = [
        name
        for name, block in statistics.blocks.items()
        if _still(block, tolerance)
        or (partial and bool((block.variance.sqrt() <= tolerance).any()))
    ]
    harm = {name: _loss_bound(statistics.blocks[name], tolerance) for name in candidates}
    chosen = sorted(candidates, key=lambda name: harm[name])
    restored: list[str] = []
    while True:
        folded, blocks, structure = _fold(model, statistics, tolerance, chosen, example)
        first, second = _measure(model, folded, loader, example)
        drop = 0.0 if first.top1 is None or second.top1 is None else first.top1 - second.top1
        if tried is not None:
            tried(len(chosen), drop)
        if max_drop is None or drop <= max_drop or not chosen:
            break
        restored.append(chosen.pop())
    return FoldReport(folded, tuple(blocks), first, second, tuple(restored), tolerance, structure)


def _still(block: BlockStatistics, tolerance: float) -> bool:
    """Whether no gate of the block moves."""
    return bool((block.variance.sqrt() <= tolerance).all())


def _loss_bound(block: BlockStatistics, tolerance: float, mask: Tensor | None = None) -> float:
    """The predicted bound of `FoldedBlock` for the channels whose gates are below the tolerance."""
    if mask is None:
        mask = block.variance.sqrt() <= tolerance
    power = block.energy / max(block.count, 1)
    everything = ((block.variance + block.mean.square()) * power).sqrt().sum()
    lost = block.folding_bound[mask].sum()
    return float(lost / everything) if float(everything) > 0 else 0.0


def _example(model: nn.Module, example: Tensor | None, loader: Iterable[Any] | None) -> Tensor:
    if example is not None:
        return example
    parameter = next(model.parameters())
    if loader is not None:
        for batch in loader:
            if len(batch[0]):
                return batch[0][:1].to(parameter)
        raise UserError("the loader gives no images to judge the folded network on")
    size = getattr(model, "input_size", None)
    if size is None:
        raise UserError("example_input is needed, for instance torch.zeros(1, 3, 224, 224)")
    return torch.zeros(1, *size).to(parameter)


def _fold(
    model: nn.Module,
    statistics: GateStatistics,
    tolerance: float,
    chosen: list[str],
    example: Tensor,
) -> tuple[nn.Module, list[FoldedBlock], dict[str, dict[str, Any]]]:
    """A copy of the model with the chosen blocks folded."""
    folded = copy.deepcopy(model)
    # Factors of different blocks go into weights of their own or commute, so one trace serves all.
    trace = record(folded, (example,))
    blocks: list[FoldedBlock] = []
    structure: dict[str, dict[str, Any]] = {}
    for name, about in statistics.blocks.items():
        if name not in chosen:
            blocks.append(FoldedBlock(name, about.channels, 0, "kept", "", 0.0))
            continue
        result, entry = _fold_block(folded, about, tolerance, trace)
        blocks.append(result)
        if entry is not None:
            structure[name] = entry
    config = getattr(folded, "config", None)
    if isinstance(config, dict):  # what a checkpoint of the model is rebuilt from
        former = config.get("folded", {})
        folded.config = {**config, "folded": {**former, **structure}}  # type: ignore[assignment]
    return folded, blocks, structure


def _fold_block(
    model: nn.Module, about: BlockStatistics, tolerance: float, trace: Trace
) -> tuple[FoldedBlock, dict[str, Any] | None]:
    block = model.get_submodule(about.name)
    constant = about.variance.sqrt() <= tolerance
    calls = trace.calls_of(block)
    alone = len(calls) == 1 and len(calls[0].inputs) == 1
    if bool(constant.all()):
        factor = about.mean
        edits, into = None, ""
        if alone:
            into, edits = "before", edits_before(trace, calls[0], factor)
            if edits is None:
                into, edits = "after", edits_after(trace, calls[0], factor)
        bound = _loss_bound(about, tolerance)
        if edits is None:
            scale = ConstantScale(about.channels)
            scale.scale.copy_(factor)
            replace_block(model, about.name, scale.to(next(model.parameters()).device))
            why = "no layer around it could take the factors"
            kind = "constant"
            done = FoldedBlock(about.name, about.channels, about.channels, kind, "", bound, why)
            return done, {"kind": kind, "channels": about.channels}
        for edit in edits:
            edit()
        replace_block(model, about.name, None)
        done = FoldedBlock(about.name, about.channels, about.channels, "removed", into, bound)
        return done, {"kind": "removed"}
    return _fold_part(model, about, constant, trace, alone)


def _fold_part(
    model: nn.Module, about: BlockStatistics, constant: Tensor, trace: Trace, alone: bool
) -> tuple[FoldedBlock, dict[str, Any] | None]:
    block = model.get_submodule(about.name)

    def kept(why: str) -> tuple[FoldedBlock, None]:
        return FoldedBlock(about.name, about.channels, 0, "kept", "", 0.0, why), None

    made = as_partial(block, about.channels)
    if made is None:
        return kept(f"{type(block).__name__} folds as a whole only")
    if not alone:
        return kept("it runs more than once")
    constant = constant & (about.mean.abs() > SMALLEST_FACTOR)
    if not bool(constant.any()):
        return kept("the constants are 0")
    factor = torch.where(constant, about.mean, 1)
    call = trace.calls_of(block)[0]
    into, edits = "before", edits_before(trace, call, factor)
    if edits is None:
        into, edits = "after", edits_after(trace, call, factor)
    if edits is None:
        return kept("no layer around it could take the factors")
    for edit in edits:
        edit()
    smaller = keep_channels(made, torch.nonzero(~constant)[:, 0])
    if into == "before":  # what is squeezed is scaled now: the first layer undoes it
        with torch.no_grad():
            smaller.fc1.weight.div_(factor.to(smaller.fc1.weight))
    replace_block(model, about.name, smaller)
    count = int(constant.sum())
    bound = _loss_bound(about, 0, constant)
    done = FoldedBlock(about.name, about.channels, count, "partial", into, bound)
    return done, {"kind": "partial", "shape": asdict(smaller.shape)}


def _measure(
    original: nn.Module, folded: nn.Module, loader: Iterable[Any] | None, example: Tensor
) -> tuple[Measured, Measured]:
    """Both networks over the same batches, alternately, so that their speeds compare."""
    models = (original, folded)
    sizes = [
        (count_parameters(model), count_multiply_adds(model, tuple(example.shape[1:])))
        for model in models
    ]
    if loader is None:
        return Measured(*sizes[0]), Measured(*sizes[1])
    device = next(original.parameters()).device
    correct, loss, seconds, images = [0, 0], [0.0, 0.0], [0.0, 0.0], 0
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                if isinstance(batch, Tensor) or len(batch) < 2:
                    raise UserError("the loader gives no class numbers to judge the accuracy by")
                x, labels = batch[0].to(device), batch[1].to(device)
                for index, model in enumerate(models):
                    began = time.perf_counter()
                    logits = model(x).float()
                    seconds[index] += time.perf_counter() - began
                    loss[index] += float(F.cross_entropy(logits, labels, reduction="sum"))
                    correct[index] += int((logits.argmax(1) == labels).sum())
                images += len(x)
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    if not images:
        raise UserError("the loader gives no images to judge the folded network on")
    first, second = (
        Measured(*sizes[i], 100 * correct[i] / images, loss[i] / images, images / seconds[i])
        for i in (0, 1)
    )
    return first, second
