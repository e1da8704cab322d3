"""What gates did over a data set: the results of `record_gates`, saved and loaded.

Gates that approach constants are described by ASR (arXiv 2304.06345), and SE blocks that do not
help by LTH4SA (arXiv 2207.07858); the per-class means are figures 6 and 7 of the SE paper.

Shape suffixes: K classes, C channels, B bins.
"""

import difflib
import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from senet.errors import UserError
from senet.gates.accumulators import Histogram, Moments, TopImages
from senet.support.files import atomic_write
from senet.support.shapes import Float, Int
from senet.support.tensors import pack, unpack

_FORMAT = "senet-gates"


@dataclass
class BlockStatistics:
    """Statistics of the gates of one SE block.

    Attributes:
        name: dotted name of the block.
        channels: C.
        gate: name of the gate function, as far as known.
        limits: smallest and largest value of the gate function; None for an unbounded one.
        hidden: hidden width of the block; None where there is one layer or none.
        places: spatial size of the map that is scaled, of the first batch.
        moments: count, mean and variance of each gate by class, (K,C).
        histogram: of each gate over all images, for quantiles, (C,B).
        class_histogram: of each gate by class, (K,C,b); None where it would not fit the memory.
        low: gates within 5% of the range of its lower end, (C,) counts.
        high: gates within 5% of the range of its upper end, (C,) counts.
        smallest: (C,); largest: (C,).
        energy: sum over images of the squared mean magnitude of the channel's map, (C,).
        top: the images that open each channel most.
    """

    name: str
    channels: int
    gate: str
    limits: tuple[float, float] | None
    hidden: int | None
    places: tuple[int, ...]
    moments: Moments
    histogram: Histogram
    class_histogram: Histogram | None
    low: Float[Tensor, " c"]
    high: Float[Tensor, " c"]
    smallest: Float[Tensor, " c"]
    largest: Float[Tensor, " c"]
    energy: Float[Tensor, " c"]
    top: TopImages

    @property
    def count(self) -> int:
        """Gates seen of each channel (images, times the calls of a block that is reused)."""
        return int(self.moments.count.sum())

    @property
    def mean(self) -> Float[Tensor, " c"]:
        """Mean gate of each channel over all images."""
        return self.moments.overall()[0]

    @property
    def variance(self) -> Float[Tensor, " c"]:
        """Variance of each gate over all images (of the population, not Bessel-corrected)."""
        return self.moments.overall()[1]

    @property
    def class_mean(self) -> Float[Tensor, "k c"]:
        """Mean gates by class, NaN for classes without images."""
        empty = self.moments.count[:, None] == 0
        return torch.where(empty, torch.nan, self.moments.mean)

    @property
    def class_std(self) -> Float[Tensor, "k c"]:
        """Standard deviation of the gates within each class, NaN for classes without images."""
        return (self.moments.squares / self.moments.count[:, None]).sqrt()

    @property
    def between_by_channel(self) -> Float[Tensor, " c"]:
        """Share of each gate's variance that lies between classes, 0 where there is none."""
        between, total = self._between(), self.variance * self.count
        return torch.where(total > 0, between / total.clamp(min=1e-300), 0).clamp(0, 1)

    @property
    def between_share(self) -> float:
        """Share of the gates' variance that lies between classes, over all channels, in [0, 1]."""
        total = float(self.variance.sum()) * self.count
        return float(self._between().sum()) / total if total > 0 else 0.0

    def _between(self) -> Tensor:
        deviation = self.moments.mean - self.mean
        return (self.moments.count[:, None] * deviation.square()).sum(0)

    @property
    def saturation(self) -> tuple[float, float] | None:
        """Share of gates near the lower and near the upper end; None for an unbounded gate."""
        if self.limits is None:
            return None
        total = self.count * self.channels
        return float(self.low.sum()) / total, float(self.high.sum()) / total

    @property
    def folding_bound(self) -> Float[Tensor, " c"]:
        """Bound on the mean of |s − mean(s)|·|v| by channel, v the map that is scaled.

        What is lost where a gate becomes its mean, by Cauchy and Schwarz (docs/algebra.md,
        section 4):
        √(Var(s) · mean over images of (mean over positions of |v|)²).
        """
        return (self.variance * self.energy / max(self.count, 1)).sqrt()

    def quantile(self, q: float) -> Float[Tensor, " c"]:
        """The q-quantile of each gate over all images, exact to a bin of the histogram."""
        return self.histogram.quantile(q).clamp(self.smallest, self.largest)

    def class_quantile(self, q: float) -> Float[Tensor, "k c"] | None:
        """The q-quantile of each gate by class, or None where it was not kept; NaN: no images."""
        return None if self.class_histogram is None else self.class_histogram.quantile(q)

    def separating(self, a: int, b: int, n: int = 10) -> Int[Tensor, " m"]:
        """The channels whose gates tell class number a from b best, at most n, best first.

        Sorted by the difference of the class means in units of the spread within both.
        """
        mean, squares, count = self.moments.mean, self.moments.squares, self.moments.count
        within = (squares[a] + squares[b]) / (count[a] + count[b]).clamp(min=1)
        # A gate that never moves separates nothing, one that moves only between classes most.
        distance = (mean[a] - mean[b]).abs() / (within + 1e-12).sqrt()
        return distance.argsort(dim=0, descending=True, stable=True)[:n]


@dataclass
class GateStatistics:
    """What the gates of a model did over a data set.

    Attributes:
        blocks: by name of the SE block, in the model's order.
        classes: names of the classes.
        images: number of images.
        fingerprint: of the SE blocks' names and weights; `fold_gates` refuses another model's.
    """

    blocks: dict[str, BlockStatistics]
    classes: tuple[str, ...]
    images: int
    fingerprint: str = field(default="")

    def stages(self) -> dict[int, list[str]]:
        """Block names by stage, numbered from 2: a run of blocks whose maps have one size."""
        stages: dict[int, list[str]] = {}
        number, before = 1, None
        for name, block in self.blocks.items():
            if block.places != before:
                number, before = number + 1, block.places
            stages.setdefault(number, []).append(name)
        return stages

    def class_number(self, name: str) -> int:
        """Number of the class of that name.

        Raises:
            UserError: no such class; the message names the closest.
        """
        if name not in self.classes:
            close = difflib.get_close_matches(name, self.classes, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {len(self.classes)}"
            raise UserError(f"no class {name!r}; {hint}")
        return self.classes.index(name)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the statistics as one safetensors file, as a whole or not at all."""
        tensors: dict[str, Tensor] = {}
        described = []
        for index, block in enumerate(self.blocks.values()):
            tensors |= {f"{index}.{key}": value for key, value in _tensors(block).items()}
            described.append(
                {
                    "name": block.name,
                    "channels": block.channels,
                    "gate": block.gate,
                    "limits": block.limits,
                    "hidden": block.hidden,
                    "places": block.places,
                    "range": block.histogram.range,
                    "class_range": block.class_histogram and block.class_histogram.range,
                }
            )
        metadata = {
            "version": 1,
            "blocks": described,
            "classes": self.classes,
            "images": self.images,
            "fingerprint": self.fingerprint,
        }
        atomic_write(path, pack(tensors, _FORMAT, metadata))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "GateStatistics":
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or it holds something else.
        """
        if not Path(path).is_file():
            raise UserError(f"gate statistics: no such file: {path}")
        try:
            tensors, held = unpack(path, _FORMAT)
        except SafetensorError as error:
            raise UserError(f"{path} holds no gate statistics of senet") from error
        if held is None:
            raise UserError(f"{path} holds no gate statistics of senet")
        metadata = json.loads(held)
        blocks = {}
        for index, about in enumerate(metadata["blocks"]):
            mine = {
                key.split(".", 1)[1]: value
                for key, value in tensors.items()
                if key.split(".", 1)[0] == str(index)
            }
            blocks[about["name"]] = _block(about, mine)
        return cls(blocks, tuple(metadata["classes"]), metadata["images"], metadata["fingerprint"])


_PLAIN = ("low", "high", "smallest", "largest", "energy")


def _tensors(block: BlockStatistics) -> dict[str, Tensor]:
    tensors = {name: getattr(block, name) for name in _PLAIN}
    tensors |= {f"moments.{k}": getattr(block.moments, k) for k in ("count", "mean", "squares")}
    tensors |= {"top.values": block.top.values, "top.images": block.top.images}
    tensors["histogram"] = block.histogram.counts
    if block.class_histogram is not None:
        tensors["class_histogram"] = block.class_histogram.counts
    return {key: value.contiguous() for key, value in tensors.items()}


def _block(about: dict[str, Any], tensors: dict[str, Tensor]) -> BlockStatistics:
    limits = about["limits"]
    by_class = None
    if "class_histogram" in tensors:
        by_class = Histogram(tensors["class_histogram"], tuple(about["class_range"]))
    return BlockStatistics(
        name=about["name"],
        channels=about["channels"],
        gate=about["gate"],
        limits=None if limits is None else (limits[0], limits[1]),
        hidden=about.get("hidden"),
        places=tuple(about["places"]),
        moments=Moments(*(tensors[f"moments.{key}"] for key in ("count", "mean", "squares"))),
        histogram=Histogram(tensors["histogram"], tuple(about["range"])),
        class_histogram=by_class,
        top=TopImages(tensors["top.values"], tensors["top.images"]),
        **{name: tensors[name] for name in _PLAIN},
    )
