"""Record what the gates of SE blocks do over a data set, in constant memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from senet.anatomy.recognition import excitations
from senet.errors import SenetError, UserError
from senet.gates.accumulators import Histogram, Moments, TopImages
from senet.gates.statistics import BlockStatistics, GateStatistics
from senet.nn.block import IdentitySigmoid, SqueezeExcitation
from senet.nn.hooks import expected_hooks

BINS, CLASS_BINS = 256, 64
CLASS_HISTOGRAM_BYTES = 2**28
SATURATED = 0.05  # share of the gate's range that counts as its end
# Submodules that give the gates in other libraries' blocks, else the last one of the block.
_GATE_NAMES = ("gate", "scale_activation", "sigmoid", "hsigmoid", "hard_sigmoid")


def record_gates(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    top: int = 9,
    seen: Callable[[int], None] | None = None,
) -> GateStatistics:
    """Run a model over a data set and gather statistics of all gates.

    SE blocks are those of this package, of torchvision and of timm, and modules named alike. The
    memory needed does not depend on the number of images.

    Args:
        model: the network; runs where it is, in evaluation mode, its mode is restored.
        loader: batches (images, labels, …), images (N,C,*) and class numbers (N,); or images
            alone, which count as one class. It must not shuffle, for the images that open a
            channel most are named by their position.
        classes: names of the classes; by default `loader.dataset.classes`, else "all" for one
            class, else the numbers up to the model's outputs.
        top: images kept for each channel.
        seen: hears of the images of each batch.

    Raises:
        UserError: the model has no SE blocks, or the loader no images, or a label has no class.
        SenetError: a block does not show its gates.
    """
    blocks = excitations(model)
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no SE blocks whose gates could be recorded; "
            "senet.insert puts some into it"
        )
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    names = tuple(classes) if classes is not None else _class_names(loader)
    recorder = _Recorder(blocks, names, top)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with recorder.listening(), torch.no_grad(), expected_hooks():
            for batch in loader:
                images, labels = _split(batch)
                recorder.begin(len(images), labels, model)
                model(images.to(device))
                if seen is not None:
                    seen(len(images))
    finally:
        model.train(training)
    if not recorder.images:
        raise UserError("the loader gives no images; gates need at least one")
    return GateStatistics(
        recorder.finished(), recorder.classes, recorder.images, fingerprint(model)
    )


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    images, labels = batch[0], batch[1] if len(batch) > 1 else None
    return images, labels


def _class_names(loader: Iterable[Any]) -> tuple[str, ...]:
    names = getattr(getattr(loader, "dataset", None), "classes", None)
    return tuple(map(str, names)) if names is not None else ()


def fingerprint(model: nn.Module) -> str:
    """A digest of the names and weights of all SE blocks: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, block in excitations(model).items():
        digest.update(name.encode())
        for key, tensor in block.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def gate_of(block: nn.Module) -> nn.Module:
    """The submodule of an SE block whose output are its gates.

    Raises:
        SenetError: the block has no submodules.
    """
    for name in _GATE_NAMES:
        gate = getattr(block, name, None)
        if isinstance(gate, nn.Module):
            return gate
    leaves = [m for m in block.modules() if m is not block and not list(m.children())]
    if not leaves:
        raise SenetError(f"{type(block).__name__} has no submodule that gives its gates")
    return leaves[-1]


def gate_limits(gate: nn.Module) -> tuple[float, float] | None:
    """Smallest and largest value of a gate function; None where it is unbounded or unknown."""
    if isinstance(gate, IdentitySigmoid):
        return 0.0, 2.0
    name = type(gate).__name__.lower()
    if "tanh" in name and "hard" not in name:
        return -1.0, 1.0
    return (0.0, 1.0) if "sigm" in name else None


class _Recorder:
    """Forward hooks on all SE blocks, and what they have seen."""

    def __init__(self, blocks: dict[str, nn.Module], classes: tuple[str, ...], top: int) -> None:
        self.blocks, self.classes, self.top = blocks, classes, top
        self.images = 0
        self.labels = torch.empty(0, dtype=torch.long)
        self.statistics: dict[str, BlockStatistics] = {}
        self.maps: dict[str, Tensor] = {}
        self.places: dict[str, tuple[int, ...]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on while the context is open."""
        handles = []
        for name, block in self.blocks.items():
            handles += [
                block.register_forward_pre_hook(
                    lambda _module, inputs, name=name: self._map(name, inputs[0])
                ),
                gate_of(block).register_forward_hook(
                    lambda _module, _inputs, output, name=name: self._gates(name, output)
                ),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, images: int, labels: Tensor | None, model: nn.Module) -> None:
        """A batch is about to go through the model."""
        if labels is None:
            labels = torch.zeros(images, dtype=torch.long)
            self.classes = self.classes or ("all",)
        if not self.classes:
            count = getattr(model, "config", {}).get("num_classes") or int(labels.max()) + 1
            self.classes = tuple(str(number) for number in range(count))
        self.labels = labels.cpu()
        if images and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise UserError(
                f"label {int(self.labels.max())} has no class: there are {len(self.classes)}; "
                "name all classes by classes=[…]"
            )
        self.images += images

    def _map(self, name: str, x: Tensor) -> None:
        self.places[name] = tuple(x.shape[2:])
        wide = torch.promote_types(x.dtype, torch.float32)
        self.maps[name] = x.abs().to(wide).flatten(2).mean(2).double().cpu()

    def _gates(self, name: str, output: Tensor) -> None:
        gates = output.detach().double().cpu()
        magnitude = self.maps.get(name)
        if magnitude is None or gates.shape[0] != len(self.labels):
            raise SenetError(f"{name} does not show its gates: no map and gates for each image")
        if gates.ndim > 2 and isinstance(self.blocks[name], SqueezeExcitation):
            gates = gates.flatten(1, -2).mean(1)  # squeeze="none": a gate for each position
        elif gates.ndim > 2:
            gates = gates.flatten(2).mean(2)
        if gates.shape != magnitude.shape:
            raise SenetError(
                f"{name} does not show its gates: expected {tuple(magnitude.shape)} of "
                f"{type(gate_of(self.blocks[name])).__name__}, got {tuple(output.shape)}"
            )
        if name not in self.statistics:
            self.statistics[name] = self._empty(name, magnitude.shape[1])
        self._add(self.statistics[name], gates, magnitude)

    def _empty(self, name: str, channels: int) -> BlockStatistics:
        block, gate = self.blocks[name], gate_of(self.blocks[name])
        limits, count = gate_limits(gate), len(self.classes)
        span = limits or (0.0, 1.0)
        everything = sum(_channels(module) for module in self.blocks.values())
        fits = count * everything * CLASS_BINS * 4 <= CLASS_HISTOGRAM_BYTES
        zeros = torch.zeros(channels, dtype=torch.float64)
        return BlockStatistics(
            name=name,
            channels=channels,
            gate=block.gate_name
            if isinstance(block, SqueezeExcitation)
            else type(gate).__name__.lower(),
            limits=limits,
            places=self.places[name],
            moments=Moments.zeros(count, channels),
            histogram=Histogram.zeros((channels, BINS), span),
            class_histogram=Histogram.zeros((count, channels, CLASS_BINS), span) if fits else None,
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


def _channels(block: nn.Module) -> int:
    """Number of gates of a block, as far as its layers tell: the largest dimension of a weight."""
    return max((max(p.shape) for p in block.parameters() if p.ndim > 1), default=1)
