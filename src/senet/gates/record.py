"""Record what the gates of SE blocks do over a data set, in constant memory."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from senet.anatomy import Excitation, anatomy
from senet.anatomy.recording import evaluating
from senet.errors import SenetError, UserError
from senet.gates.accumulators import Histogram, Moments, TopImages
from senet.gates.batches import split_batch
from senet.gates.listening import Listening
from senet.gates.statistics import BlockStatistics, GateStatistics

BINS, CLASS_BINS = 256, 64
CLASS_HISTOGRAM_BYTES = 2**28
SATURATED = 0.05  # share of the gate's range that counts as its end


def record_gates(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    top: int = 9,
    seen: Callable[[int], None] | None = None,
) -> GateStatistics:
    """Run a model over a data set and gather statistics of all gates.

    SE blocks are whatever `senet.anatomy.excitations` finds, of any library, with the first image
    as example. A gate is what the map is multiplied by, checked once against output ÷ input. The
    memory needed does not depend on the number of images.

    Args:
        model: the network; runs where it is, in evaluation mode, its mode is restored.
        loader: batches (images, labels, …), images (N,C,*) and class numbers (N,); dicts of
            `pixel_values` or `image`, `images` with `labels` or `label`; or images alone, which
            count as one class. It must not shuffle, for the images that open a channel most are
            named by their position.
        classes: names of the classes; by default `loader.dataset.classes`, else "all" for one
            class, else the numbers up to the model's outputs or the largest label.
        top: images kept for each channel.
        seen: hears of the images of each batch.

    Raises:
        UserError: the model has no SE blocks, or the loader no images, or a label has no class.
        SenetError: a block does not show its gates.
    """
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    names = tuple(classes) if classes is not None else _class_names(loader)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    recorder: _Recorder | None = None
    listening: Listening | None = None
    for batch in loader:
        images, labels = split_batch(batch)
        if not len(images):
            continue
        images = images.to(device)
        if recorder is None or listening is None:
            blocks = _blocks(model, images)
            recorder = _Recorder(blocks, names, _outputs(model), top)
            listening = Listening(model, blocks, recorder.seen)
        recorder.begin(len(images), labels)
        with evaluating(model), torch.no_grad(), listening:
            model(images)
        if seen is not None:
            seen(len(images))
    if recorder is None:
        raise UserError("the loader gives no images; gates need at least one")
    return GateStatistics(
        recorder.finished(), recorder.classes, recorder.images, fingerprint(recorder.blocks)
    )


def _blocks(model: nn.Module, images: Tensor) -> dict[str, Excitation]:
    try:
        seen = anatomy(model, images[:1])
    except UserError:  # an exported program may take batches of one size only
        if len(images) == 1:
            raise
        seen = anatomy(model, images)
    if not seen.excitations:
        alike = "".join(f" ({name}: {what})" for name, what in list(seen.others.items())[:1])
        raise UserError(
            f"{type(model).__name__} has no SE blocks whose gates could be recorded{alike}; "
            "senet.insert puts some into it"
        )
    return seen.excitations


def _class_names(loader: Iterable[Any]) -> tuple[str, ...]:
    names = getattr(getattr(loader, "dataset", None), "classes", None)
    return tuple(map(str, names)) if names is not None else ()


def _outputs(model: nn.Module) -> int:
    """Number of classes that a model says it tells apart; 0 where it says nothing."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return int(config.get("num_classes") or 0)
    return int(getattr(config, "num_labels", 0) or getattr(model, "num_classes", 0) or 0)


def fingerprint(blocks: Mapping[str, Excitation]) -> str:
    """A digest of the names and weights of all SE blocks: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, block in blocks.items():
        digest.update(name.encode())
        module = block.module
        weights = block.weights if module is None else module.state_dict()
        for key, tensor in weights.items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Recorder:
    """What all SE blocks have shown.

    Args:
        blocks: the SE blocks.
        classes: names of the classes; empty where the labels tell them.
        outputs: number of classes then, as far as known.
        top: images kept for each channel.
    """

    def __init__(
        self, blocks: dict[str, Excitation], classes: tuple[str, ...], outputs: int, top: int
    ) -> None:
        self.blocks, self.classes, self.top = blocks, classes, top
        self.named, self.outputs = bool(classes), outputs
        self.images = 0
        self.labels = torch.empty(0, dtype=torch.long)
        self.statistics: dict[str, BlockStatistics] = {}

    def begin(self, images: int, labels: Tensor | None) -> None:
        """A batch is about to go through the model."""
        if labels is None:
            labels = torch.zeros(images, dtype=torch.long)
            self.classes = self.classes or ("all",)
            self.named = True
        self.labels = labels.cpu().long()
        if self.labels.shape != (images,):
            raise UserError(
                f"labels must be class numbers ({images},), got shape {tuple(self.labels.shape)}"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if not self.named:
            self._grow(max(high + 1, self.outputs))
        if low < 0 or high >= len(self.classes):
            raise UserError(
                f"label {high if low >= 0 else low} has no class: there are {len(self.classes)}; "
                "name all classes by classes=[…]"
            )
        self.images += images

    def _grow(self, count: int) -> None:
        """Numbers as names up to `count` classes: data sorted by class tell them bit by bit."""
        if count <= len(self.classes):
            return
        self.classes = tuple(str(number) for number in range(count))
        for block in self.statistics.values():
            block.moments.grow(count)
            if block.class_histogram is not None and self._fits():
                block.class_histogram.grow(count)
            else:
                block.class_histogram = None

    def seen(self, name: str, map_: Tensor, gates: Tensor) -> None:
        """Gates (N,C) of a block, and the map (N,C,*) that they scale."""
        wide = torch.promote_types(map_.dtype, torch.float32)
        magnitude = map_.abs().to(wide).flatten(2).mean(2).double().cpu()
        gates = gates.double().cpu()
        if len(gates) != len(self.labels):
            raise SenetError(
                f"{name} does not show its gates: {len(gates)} for {len(self.labels)} images"
            )
        if name not in self.statistics:
            self.statistics[name] = self._empty(name, tuple(map_.shape[2:]))
        self._add(self.statistics[name], gates, magnitude)

    def _fits(self) -> bool:
        """Whether histograms by class fit the memory."""
        everything = sum(block.channels for block in self.blocks.values())
        return len(self.classes) * everything * CLASS_BINS * 4 <= CLASS_HISTOGRAM_BYTES

    def _empty(self, name: str, places: tuple[int, ...]) -> BlockStatistics:
        block, count = self.blocks[name], len(self.classes)
        channels, span = block.channels, block.limits or (0.0, 1.0)
        zeros = torch.zeros(channels, dtype=torch.float64)
        by_class = Histogram.zeros((count, channels, CLASS_BINS), span) if self._fits() else None
        return BlockStatistics(
            name=name,
            channels=channels,
            gate=block.gate,
            limits=block.limits,
            hidden=block.hidden,
            places=places,
            moments=Moments.zeros(count, channels),
            histogram=Histogram.zeros((channels, BINS), span),
            class_histogram=by_class,
            low=zeros.clone(),
            high=zeros.clone(),
            smallest=torch.full_like(zeros, torch.inf),
            largest=torch.full_like(zeros, -torch.inf),
            energy=zeros.clone(),
            top=TopImages.empty(channels, self.top),
        )

    def _add(self, block: BlockStatistics, gates: Tensor, magnitude: Tensor) -> None:
        block.moments.add(gates, self.labels)
        block.histogram.add(gates)
        if block.class_histogram is not None:
            block.class_histogram.add(gates, self.labels)
        if block.limits is not None:
            low, high = block.limits
            edge = SATURATED * (high - low)
            block.low += (gates <= low + edge).sum(0)
            block.high += (gates >= high - edge).sum(0)
        block.smallest = torch.minimum(block.smallest, gates.amin(0))
        block.largest = torch.maximum(block.largest, gates.amax(0))
        block.energy += magnitude.square().sum(0)
        block.top.add(gates, torch.arange(self.images - len(gates), self.images))

    def finished(self) -> dict[str, BlockStatistics]:
        """The statistics in the model's order.

        Raises:
            SenetError: a block never ran.
        """
        for name in self.blocks:
            if name not in self.statistics:
                raise SenetError(f"the gates of {name} were not computed in the forward pass")
        return {name: self.statistics[name] for name in self.blocks}
