"""Fold gates that do not depend on the input into the layers around them, and measure the effect.

A gate that has the same value for every image is a constant factor, which batch norm or convolution
weights can take in: docs/algebra.md, section 4. ASR (arXiv 2304.06345) trains blocks for this; here
the gates of an already trained network are measured, folded and judged by the network's accuracy.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from senet.anatomy import Anatomy, Excitation
from senet.anatomy.describe import multiply_adds
from senet.anatomy.example import attempt, guessed_arguments
from senet.anatomy.excitations import anatomy, read
from senet.anatomy.graph import Trace
from senet.anatomy.recording import evaluating, record, run
from senet.errors import UserError
from senet.gates.batches import split_batch
from senet.gates.blocks import ConstantScale, as_partial, keep_channels
from senet.gates.inline import Product, product_of, replace_product
from senet.gates.listening import Listening
from senet.gates.record import fingerprint
from senet.gates.statistics import BlockStatistics, GateStatistics
from senet.gates.targets import edits_after, edits_before
from senet.insertion.replace import replace_block
from senet.models.cost import count_parameters
from senet.nn.hooks import without_remark
from senet.support.copies import copied

# Of what a network with constants in the place of its gates gives, by dtype: the rounding of some
# hundred layers whose weights were multiplied. A factor in the wrong place is far beyond.
PROOF = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_NO_IMAGES = (
    "the loader gives no images to judge the folded network on; an iterator gives them once, and "
    "max_drop may need them several times: pass a DataLoader or a list"
)
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
            gone through once for each attempt: an iterator will do without `max_drop`.
        max_drop: most top-1 in percentage points that may be lost; needs `loader`. While more is
            lost, the block with the largest predicted harm is put back, so that what does least
            harm stays folded. The last resort is the original.
        partial: also fold some gates of a block where others move. That saves parameters, but
            such a block no longer runs in the fused operator.
        example_input: what to trace the network with; by default zeros of `model.input_size`, or
            the first image of the loader.
        tried: hears of the number of folded blocks and the drop of each attempt.

    Raises:
        UserError: statistics of another network, no labels, a generator with `max_drop`, a model
            that cannot be copied, or an argument out of range.
    """
    if not tolerance >= 0:
        raise UserError(f"tolerance must be at least 0, got {tolerance}")
    if max_drop is not None and loader is None:
        raise UserError("max_drop needs data to measure the accuracy on: pass loader=…")
    if max_drop is not None and not max_drop >= 0:
        raise UserError(f"max_drop must be at least 0 percentage points, got {max_drop}")
    if max_drop is not None and inspect.isgenerator(loader):
        raise UserError(
            "loader is a generator, which gives its batches once, and max_drop may need them "
            "several times: pass a DataLoader or a list"
        )
    example, first_pass = example_input, loader
    if example is None:
        example, first_pass = _example(model, loader)
    present = anatomy(model, example).excitations
    same = list(present) == list(statistics.blocks)
    if not same or statistics.fingerprint != fingerprint(present):
        raise UserError(
            "the statistics are of another model, or of this one before it was trained further; "
            "record them anew with senet.record_gates"
        )
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
        with without_remark():
            proven = _proven(model, present, statistics, tolerance, chosen, example)
            folded, blocks, structure = proven
            first, second = _measure(model, folded, first_pass, example)
        first_pass = loader
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


def _example(model: nn.Module, loader: Iterable[Any] | None) -> tuple[Tensor, Iterable[Any] | None]:
    """An input of the model, and all batches of the loader, of which the first are read by now.

    They are not asked for again: a loader that is an iterator gives them once.
    """
    if loader is None:
        (first,) = guessed_arguments(model, None)[0]
        return first, None
    walk = iter(loader)
    read: list[Any] = []
    while (batch := next(walk, None)) is not None:
        read.append(batch)
        images, _ = split_batch(batch)
        if len(images):
            return images[:1].to(next(model.parameters())), _continued(read, walk)
    raise UserError(_NO_IMAGES)


def _continued(read: list[Any], walk: Iterator[Any]) -> Iterator[Any]:
    """Batches that were read, and those that follow."""
    yield from read
    # Not `yield from walk`: iter() lets some iterators begin anew.
    while (batch := next(walk, None)) is not None:
        yield batch


def _proven(
    model: nn.Module,
    present: dict[str, Excitation],
    statistics: GateStatistics,
    tolerance: float,
    chosen: list[str],
    example: Tensor,
) -> tuple[nn.Module, list[FoldedBlock], dict[str, dict[str, Any]]]:
    """The folded copy, whose output on the example is that of the model with constant gates.

    Where it is not, the blocks at fault are found one by one and kept.
    """
    result = _fold(model, statistics, tolerance, chosen, example, {})
    if _agrees(model, present, statistics, tolerance, result, example):
        return result
    faults = {}
    for name in chosen:
        alone = _fold(model, statistics, tolerance, [name], example, {})
        if not _agrees(model, present, statistics, tolerance, alone, example):
            faults[name] = "folding it would change the output on the example"
    result = _fold(model, statistics, tolerance, chosen, example, faults)
    if not _agrees(model, present, statistics, tolerance, result, example):
        together = dict.fromkeys(chosen, "folding it would change the output on the example")
        return _fold(model, statistics, tolerance, chosen, example, together)
    return result


def _agrees(
    model: nn.Module,
    present: dict[str, Excitation],
    statistics: GateStatistics,
    tolerance: float,
    result: tuple[nn.Module, list[FoldedBlock], dict[str, dict[str, Any]]],
    example: Tensor,
) -> bool:
    """Whether a folded model computes what the model does with constants in the gates' place."""
    folded, blocks, _ = result
    kinds = {block.name: block for block in blocks if block.kind != "kept"}

    def constants(name: str, _map: Tensor, gates: Tensor) -> Tensor | None:
        about = statistics.blocks[name]
        if name not in kinds:
            return None
        still = about.variance.sqrt() <= tolerance
        if kinds[name].kind == "partial":
            still &= about.mean.abs() > SMALLEST_FACTOR
        mean = about.mean.to(gates.device, gates.dtype)
        return torch.where(still.to(gates.device), mean, gates)

    with evaluating(model), torch.no_grad(), Listening(model, present, constants):
        wanted = tree_leaves(model(example))
    got = tree_leaves(run(folded, (example,)))
    pairs = [
        (a, b) for a, b in zip(got, wanted, strict=True) if isinstance(b, Tensor) and b.numel()
    ]
    return all(
        float((a - b).abs().max()) <= PROOF[b.dtype] * max(float(b.abs().max()), 1e-6)
        for a, b in pairs
        if b.is_floating_point()
    )


def _fold(
    model: nn.Module,
    statistics: GateStatistics,
    tolerance: float,
    chosen: list[str],
    example: Tensor,
    faults: dict[str, str],
) -> tuple[nn.Module, list[FoldedBlock], dict[str, dict[str, Any]]]:
    """A copy of the model with the chosen blocks folded, but for those with a fault."""
    folded = copied(model)
    # Factors of different blocks go into weights of their own or commute, so one trace serves all.
    seen = read(folded, attempt(lambda: record(folded, (example,)), (example,)))
    blocks: list[FoldedBlock] = []
    structure: dict[str, dict[str, Any]] = {}
    inline: list[tuple[str, Product, Tensor | None]] = []
    for name, about in statistics.blocks.items():
        if name not in chosen or name in faults:
            why = faults.get(name, "")
            blocks.append(FoldedBlock(name, about.channels, 0, "kept", "", 0.0, why))
            continue
        result, entry = _fold_block(folded, about, tolerance, seen, inline)
        blocks.append(result)
        if entry is not None:
            structure[name] = entry
    for name, product, scale in reversed(inline):  # a product's number counts those before it
        folded = replace_product(folded, product, scale)
        shape = None if scale is None else list(scale.shape)
        structure[name] = {"kind": "inline", "product": asdict(product), "scale": shape}
    config = getattr(folded, "config", None)
    if isinstance(config, dict):  # what a checkpoint of the model is rebuilt from
        former = config.get("folded", {})
        folded.config = {**config, "folded": {**former, **structure}}  # type: ignore[assignment]
    return folded, blocks, structure


def _kept(about: BlockStatistics, why: str) -> FoldedBlock:
    return FoldedBlock(about.name, about.channels, 0, "kept", "", 0.0, why)


def _fold_block(
    model: nn.Module,
    about: BlockStatistics,
    tolerance: float,
    seen: Anatomy,
    inline: list[tuple[str, Product, Tensor | None]],
) -> tuple[FoldedBlock, dict[str, Any] | None]:
    block = seen.excitations[about.name]
    constant = about.variance.sqrt() <= tolerance
    if block.shift:
        return _kept(about, "it also adds something"), None
    if not bool(constant.all()):
        return _fold_part(model, about, constant, seen.trace, block)
    factor, first = about.mean, block.occurrences[0]
    product = None if block.module is not None else product_of(model, seen.trace, first)
    if isinstance(product, str):
        return _kept(about, product), None
    edits, into = None, ""
    if len(block.occurrences) == 1:
        into, edits = "before", edits_before(seen.trace, first, factor)
        if edits is None:
            into, edits = "after", edits_after(seen.trace, first, factor)
    for edit in edits or ():
        edit()
    bound = _loss_bound(about, tolerance)
    kind, into, why = "removed", into, ""
    if edits is None:
        kind, into, why = "constant", "", "no layer around it could take the factors"
    done = FoldedBlock(about.name, about.channels, about.channels, kind, into, bound, why)
    if product is not None:
        scale = None if edits is not None else first.constants(factor)
        inline.append((about.name, product, scale))
        return done, None
    if edits is not None:
        replace_block(model, about.name, None)
        return done, {"kind": kind}
    scale_ = ConstantScale(about.channels)
    scale_.scale.copy_(factor)
    replace_block(model, about.name, scale_.to(next(model.parameters()).device))
    return done, {"kind": kind, "channels": about.channels}


def _fold_part(
    model: nn.Module, about: BlockStatistics, constant: Tensor, trace: Trace, block: Excitation
) -> tuple[FoldedBlock, dict[str, Any] | None]:
    made = as_partial(block)
    if made is None:
        kind = type(block.module).__name__ if block.module is not None else "a block in other code"
        return _kept(about, f"{kind} folds as a whole only"), None
    if len(block.occurrences) > 1:
        return _kept(about, "it runs more than once"), None
    constant = constant & (about.mean.abs() > SMALLEST_FACTOR)
    if not bool(constant.any()):
        return _kept(about, "the constants are 0"), None
    factor = torch.where(constant, about.mean, 1)
    first = block.occurrences[0]
    into, edits = "before", edits_before(trace, first, factor)
    if edits is None:
        into, edits = "after", edits_after(trace, first, factor)
    if edits is None:
        return _kept(about, "no layer around it could take the factors"), None
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
        (count_parameters(model), _multiply_adds(record(model, (example,)), len(example)))
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
                x, labels = split_batch(batch)
                if labels is None:
                    raise UserError("the loader gives no class numbers to judge the accuracy by")
                x, labels = x.to(device), labels.to(device)
                for index, model in enumerate(models):
                    began = time.perf_counter()
                    logits = _logits(model(x)).float()
                    seconds[index] += time.perf_counter() - began
                    loss[index] += float(F.cross_entropy(logits, labels, reduction="sum"))
                    correct[index] += int((logits.argmax(1) == labels).sum())
                images += len(x)
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    if not images:
        raise UserError(_NO_IMAGES)
    first, second = (
        Measured(*sizes[i], 100 * correct[i] / images, loss[i] / images, images / seconds[i])
        for i in (0, 1)
    )
    return first, second


def _multiply_adds(trace: Trace, images: int) -> int:
    """Of one image. Not counted on the meta device, where not every network runs."""
    return sum(map(multiply_adds, trace.nodes)) // max(images, 1)


def _logits(output: Any) -> Tensor:
    """The logits (N,K): what a network returns, or what Hugging Face's output names so."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits")
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError("the accuracy needs a network that returns logits (N, classes)")
    return logits
