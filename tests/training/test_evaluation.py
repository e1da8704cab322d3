"""Evaluation against a slow, obvious count."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.errors import UserError
from senet.tasks.classification import Classification
from senet.training.evaluation import Stopped, evaluate, in_float32, moved
from senet.training.session import split


class Table(nn.Module):
    """Looks the logits up by the first pixel, an index; notes the mode it was called in."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes.add(self.training)
        return self.logits[images[:, 0, 0, 0].long()]


@contextmanager
def resource_limit(more: int) -> Iterator[None]:
    """Let this process take that many bytes of address space more than it has."""
    has = psutil.Process().memory_info().vms
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def named(classes: int) -> Classification:
    return Classification(tuple(str(c) for c in range(classes)))


def batches(labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(len(labels), dtype=torch.float32).view(-1, 1, 1, 1)
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize(("classes", "k"), [(2, 2), (4, 4), (5, 5), (9, 5)])
def test_matches_counting(classes: int, k: int) -> None:
    n = 53
    logits, labels = torch.randn(n, classes), torch.randint(classes, (n,))
    model = Table(logits)
    result = evaluate(model, batches(labels, 8), named(classes))
    ranked = logits.argsort(dim=1, descending=True)
    top1 = sum(int(label == row[0]) for label, row in zip(labels, ranked, strict=True))
    top5 = sum(int(label in row[:k]) for label, row in zip(labels, ranked, strict=True))
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for label, row in zip(labels, ranked, strict=True):
        confusion[label, row[0]] += 1
    assert (result.n, result.k) == (n, k)
    assert result.top1 == 100 * top1 / n
    assert result.top5 == 100 * top5 / n
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert torch.equal(result.confusion, confusion)
    assert result.images_per_second > 0
    assert model.modes == {False}


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training: bool) -> None:
    model = Table(torch.randn(4, 3)).train(training)
    evaluate(model, batches(torch.tensor([0, 1, 2, 0]), 2), named(3))
    assert model.training == training


def test_loss_that_is_nan_is_not_left_out() -> None:
    logits = torch.randn(4, 3)
    logits[2] = torch.nan
    result = evaluate(Table(logits), batches(torch.tensor([0, 1, 2, 0]), 2), named(3))
    assert result.loss != result.loss


def test_other_number_of_classes() -> None:
    loader = batches(torch.tensor([0, 1]), 2)
    with pytest.raises(UserError, match="the network has 3 classes, the data 2"):
        evaluate(Table(torch.randn(2, 3)), loader, named(2))


def test_no_images() -> None:
    with pytest.raises(UserError, match="no validation images"):
        evaluate(Table(torch.randn(2, 3)), [], named(3))


def test_stop() -> None:
    seen = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(torch.tensor([0, 1, 2, 0]), 1):
            seen.append(batch)
            yield batch

    model = Table(torch.randn(4, 3))
    with pytest.raises(Stopped):
        evaluate(model, loader(), named(3), stop=lambda: len(seen) == 2)
    assert len(seen) == 2
    assert model.training


def test_thousands_of_classes_need_no_matrix_of_them() -> None:
    """A matrix of 30,000 classes would be 7 GB, in each batch; the pairs are 53."""
    classes = 30_000
    labels = torch.arange(20)
    logits = torch.zeros(20, classes)
    logits[torch.arange(20), torch.arange(20) * 7 % 20] = 1
    with resource_limit(3 * 2**30):
        result = evaluate(Table(logits), batches(labels, 8), named(classes))
    assert result.top1 == 100 * sum(i * 7 % 20 == i for i in range(20)) / 20
    assert [*map(tuple, result.pairs.tolist())] == [(i, i * 7 % 20) for i in range(20)]
    assert result.counts.tolist() == [1] * 20


class Pair(NamedTuple):
    image: Tensor
    lengths: list[Tensor]


def test_batches_keep_their_containers() -> None:
    image, lengths = torch.randn(4, 3, 2, 2).double(), [torch.arange(4)]
    cpu = torch.device("cpu")
    for batch in (Pair(image, lengths), (image, lengths)):
        there, single = moved(batch, cpu), in_float32(batch)
        assert type(there) is type(single) is type(batch)
        assert there[0].is_contiguous(memory_format=torch.channels_last)
        assert single[0].dtype == torch.float32
        assert single[1][0].dtype == torch.int64
        first, second = split(batch, 2)
        assert type(first) is type(batch)
        assert torch.equal(second[0], image[2:])
        assert torch.equal(second[1][0], lengths[0][2:])
