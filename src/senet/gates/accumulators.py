"""Statistics that are updated batch by batch: moments, histograms, the largest values.

Shape suffixes: N images, K classes, C channels, B bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from senet.support.shapes import Float, Int


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of C numbers in each of K classes.

    Batches are merged as by Chan, Golub and LeVeque (1983), without the cancellation of
    E[x²] − E[x]².

    Attributes:
        count: (K,) float64.
        mean: (K,C) float64, 0 for empty classes.
        squares: (K,C) float64, sums of squared deviations from the mean.
    """

    count: Float[Tensor, " k"]
    mean: Float[Tensor, "k c"]
    squares: Float[Tensor, "k c"]

    @classmethod
    def zeros(cls, classes: int, channels: int) -> "Moments":
        """No values seen."""
        zeros = torch.zeros(classes, channels, dtype=torch.float64)
        return cls(zeros.sum(1), zeros, zeros.clone())

    def add(self, x: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> None:
        """Values x (N,C) of images of the classes `labels` (N,)."""
        classes = len(self.count)
        count = torch.bincount(labels, minlength=classes).to(self.count.dtype)
        mean = torch.zeros_like(self.mean).index_add_(0, labels, x)
        mean /= count.clamp(min=1)[:, None]
        squares = torch.zeros_like(self.mean).index_add_(0, labels, (x - mean[labels]).square())
        total = self.count + count
        delta = mean - self.mean
        share = (count / total.clamp(min=1))[:, None]
        self.squares += squares + delta.square() * share * self.count[:, None]
        self.mean += delta * share
        self.count = total

    def grow(self, classes: int) -> None:
        """Room for more classes, without values."""
        more = Moments.zeros(classes - len(self.count), self.mean.shape[1])
        self.count = torch.cat([self.count, more.count])
        self.mean = torch.cat([self.mean, more.mean])
        self.squares = torch.cat([self.squares, more.squares])

    def overall(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean and variance (of the population) over all classes together, (C,) each."""
        total = self.count.sum().clamp(min=1)
        mean = (self.count[:, None] * self.mean).sum(0) / total
        between = self.count[:, None] * (self.mean - mean).square()
        return mean, (self.squares + between).sum(0) / total


@dataclass
class Histogram:
    """Histograms of C numbers, or of C numbers in each of K classes; the range grows as needed.

    Attributes:
        counts: (C,B) or (K,C,B) int32, B even.
        range: lower end of the first bin and upper end of the last one.
    """

    counts: Int[Tensor, "*k c b"]
    range: tuple[float, float]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], span: tuple[float, float]) -> "Histogram":
        """No values seen; `span` is the first range."""
        return cls(torch.zeros(shape, dtype=torch.int32), span)

    def add(self, x: Float[Tensor, "n c"], labels: Int[Tensor, " n"] | None = None) -> None:
        """Values x (N,C), finite; of classes `labels` (N,) where there are classes."""
        if not len(x):
            return
        self._reach(float(x.min()), float(x.max()))
        low, high = self.range
        channels, bins = self.counts.shape[-2:]
        index = ((x - low) * (bins / (high - low))).long().clamp(0, bins - 1)
        row = torch.arange(channels).expand_as(index)
        if labels is not None:
            row = row + labels[:, None] * channels
        flat = (row * bins + index).flatten()
        ones = torch.ones(len(flat), dtype=self.counts.dtype)
        self.counts.view(-1).index_add_(0, flat, ones)

    def grow(self, classes: int) -> None:
        """Room for more classes, without values."""
        more = self.counts.new_zeros((classes - len(self.counts), *self.counts.shape[1:]))
        self.counts = torch.cat([self.counts, more])

    def _reach(self, smallest: float, largest: float) -> None:
        """Double the range, two bins becoming one, until it holds both values."""
        low, high = self.range
        while smallest < low or largest > high:
            pairs = self.counts.unflatten(-1, (-1, 2)).sum(-1, dtype=self.counts.dtype)
            empty = torch.zeros_like(pairs)
            if largest > high:
                high += high - low
                self.counts = torch.cat([pairs, empty], -1)
            else:
                low -= high - low
                self.counts = torch.cat([empty, pairs], -1)
        self.range = low, high

    def quantile(self, q: float) -> Float[Tensor, "*k c"]:
        """The q-quantile of each, linear within its bin; NaN where there are no values."""
        low, high = self.range
        cumulative = self.counts.double().cumsum(-1)
        total = cumulative[..., -1]
        target = (q * total)[..., None]
        index = torch.searchsorted(cumulative, target).clamp(max=self.counts.shape[-1] - 1)
        before = torch.where(index > 0, cumulative.gather(-1, (index - 1).clamp(min=0)), 0)
        inside = self.counts.gather(-1, index).clamp(min=1)
        place = (index + (target - before) / inside)[..., 0]
        value = low + place * (high - low) / self.counts.shape[-1]
        return torch.where(total > 0, value, torch.nan)


@dataclass
class TopImages:
    """The images with the largest value of each of C numbers.

    Attributes:
        values: (C,T) float64, largest first; −∞ where there are fewer images.
        images: (C,T) positions in the data set; −1 where there are fewer.
    """

    values: Float[Tensor, "c t"]
    images: Int[Tensor, "c t"]

    @classmethod
    def empty(cls, channels: int, top: int) -> "TopImages":
        """No images seen."""
        return cls(
            torch.full((channels, top), -torch.inf, dtype=torch.float64),
            torch.full((channels, top), -1),
        )

    def add(self, x: Float[Tensor, "n c"], positions: Int[Tensor, " n"]) -> None:
        """Values x (N,C) of the images at `positions` (N,)."""
        top = self.values.shape[1]
        values = torch.cat([self.values, x.T], 1)
        images = torch.cat([self.images, positions.expand(x.shape[1], -1)], 1)
        # Stable, so that of equal values the first image stays.
        order = values.argsort(dim=1, descending=True, stable=True)[:, :top]
        self.values, self.images = values.gather(1, order), images.gather(1, order)
