"""Losses, metrics, thresholds and answers of the tasks, against slow, obvious counts."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from senet.errors import UserError
from senet.tasks.classification import Classification
from senet.tasks.kinds import AnyTask, from_dict
from senet.tasks.meters import best_threshold
from senet.tasks.multilabel import LabelEvaluation, MultiLabel
from senet.tasks.regression import NumberEvaluation, Regression

CPU = torch.device("cpu")


def judged(task: AnyTask, outputs: Tensor, targets: Tensor) -> object:
    """In batches of 4."""
    meter = task.meter(CPU)
    for part in zip(outputs.split(4), targets.split(4), strict=True):
        meter.update(*part)
    return meter.finished(2.0)


def f1_at(threshold: float, probabilities: Tensor, targets: Tensor) -> float:
    found = probabilities >= threshold
    right = int((found & targets.bool()).sum())
    return 2 * right / (int(found.sum()) + int(targets.sum()))


def average_precision(probabilities: Tensor, targets: Tensor) -> float:
    """Mean over the images with the label of the precision down to each of them."""
    order = probabilities.argsort(descending=True).tolist()
    hits, found = 0, []
    for rank, index in enumerate(order, start=1):
        if targets[index]:
            hits += 1
            found.append(hits / rank)
    return sum(found) / len(found)


def test_labels_are_measured_at_the_best_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 3, generator=generator)
    targets = (torch.rand(30, 3, generator=generator) < 0.3).float()
    targets[:, 2] = 0  # a label that never occurs is left out of the means
    task = MultiLabel(("a", "b", "c"))
    result = judged(task, logits, targets)
    assert isinstance(result, LabelEvaluation)
    probabilities = logits.sigmoid()
    for k in (0, 1):
        p, t = probabilities[:, k], targets[:, k]
        best = max(f1_at(float(limit), p, t) for limit in p)
        assert result.labels[k].f1 == pytest.approx(100 * best)
        assert result.labels[k].ap == pytest.approx(100 * average_precision(p, t))
        assert result.labels[k].images == int(t.sum())
    assert result.mean_ap == pytest.approx((result.labels[0].ap + result.labels[1].ap) / 2)
    assert result.macro_f1 == pytest.approx((result.labels[0].f1 + result.labels[1].f1) / 2)
    assert result.labels[2].threshold == 0.5
    assert result.labels[2].ap != result.labels[2].ap
    assert (result.n, result.images_per_second) == (30, 15.0)
    assert result.loss == pytest.approx(
        float(F.binary_cross_entropy(probabilities, targets)), rel=1e-5
    )
    # The thresholds are kept, and used on other images instead of new ones.
    kept = task.chosen(result)
    again = judged(kept, logits.flip(0) + 1, targets.flip(0))
    assert isinstance(again, LabelEvaluation)
    assert [each.threshold for each in again.labels] == [each.threshold for each in result.labels]
    shifted = f1_at(result.labels[0].threshold, (logits[:, 0] + 1).sigmoid(), targets[:, 0])
    assert again.labels[0].f1 == pytest.approx(100 * shifted)
    with pytest.raises(UserError, match="no validation image has a label"):
        judged(task, logits, torch.zeros(30, 3))
    with pytest.raises(UserError, match="the network has 3 labels, the data 2"):
        judged(MultiLabel(("a", "b")), logits, targets[:, :2])


def test_threshold_lies_between_images() -> None:
    probabilities, targets = torch.tensor([0.1, 0.2, 0.6, 0.9]), torch.tensor([0, 0, 1, 1])
    assert best_threshold(probabilities, targets) == pytest.approx(0.4)
    assert best_threshold(probabilities, torch.ones(4, dtype=torch.long)) == pytest.approx(0.05)


def test_loss_of_labels() -> None:
    logits = torch.tensor([[2.0, -1.0]])
    targets = torch.tensor([[1.0, 0.0]])
    p = logits.sigmoid()[0]
    plain = -(p[0].log() + (1 - p[1]).log()) / 2
    assert MultiLabel(("a", "b")).loss(logits, targets).item() == pytest.approx(plain.item())
    weights = (3.0, 7.0)  # of the images that have it alone
    weighted = -(3 * p[0].log() + (1 - p[1]).log()) / 2
    loss = MultiLabel(("a", "b"), weights=weights).loss(logits, targets)
    assert loss.item() == pytest.approx(weighted.item())
    smooth = MultiLabel(("a", "b"), label_smoothing=0.2).loss(logits, targets)
    wanted = F.binary_cross_entropy(p, torch.tensor([0.9, 0.1]))
    assert smooth.item() == pytest.approx(wanted.item())


def test_numbers_are_measured_in_their_own_units() -> None:
    truth = torch.tensor(
        [[1990.0, 1.0], [2000.0, 3.0], [2010.0, 2.0], [2020.0, 6.0], [2005.0, 3.0]]
    )
    given = truth + torch.tensor([[2.0, 0.5], [-2.0, 0.5], [2.0, -0.5], [-2.0, 0.5], [0.0, 0.0]])
    mean, std = (2005.0, 3.0), (10.0, 2.0)
    task = Regression(("year", "count"), mean, std)
    outputs = (given - torch.tensor(mean)) / torch.tensor(std)
    result = judged(task, outputs, truth)
    assert isinstance(result, NumberEvaluation)
    off, spread = given - truth, truth - truth.mean(0)
    r2 = 1 - off.square().sum(0) / spread.square().sum(0)
    for k, (name, number) in enumerate(zip(task.names, result.numbers, strict=True)):
        assert number.name == name
        assert number.r2 == pytest.approx(float(r2[k]), abs=1e-5)
        assert number.mae == pytest.approx(float(off[:, k].abs().mean()), rel=1e-4)
        assert number.rmse == pytest.approx(float(off[:, k].square().mean().sqrt()), rel=1e-4)
    assert result.r2 == pytest.approx(float(r2.mean()), abs=1e-5)
    scaled = off / torch.tensor(std)
    assert result.loss == pytest.approx(float(scaled.square().mean()), rel=1e-4)
    absolute = Regression(task.names, mean, std, "l1").loss(outputs, truth)
    torch.testing.assert_close(absolute, scaled.abs().mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(task.read(outputs), given)
    assert task.answers(given[0], None) == [
        {"number": "year", "value": 1992.0},
        {"number": "count", "value": 1.5},
    ]
    assert [each.image for each in task.mistakes(given, truth, 2)] == [0, 1]
    assert task.mistakes(given, truth, 1)[0].truth == "year 1990, count 1"
    with pytest.raises(UserError, match="give at least 2"):
        judged(task, outputs[:1], truth[:1])


def test_answers_and_mistakes_of_labels() -> None:
    task = MultiLabel(("cat", "dog"), (0.9, 0.2))
    values = torch.tensor([[0.8, 0.3], [0.95, 0.1]])
    assert task.answers(values[0], None)[0]["present"] is False
    assert task.shown(task.answers(values[0], None)) == [("dog", "30.0")]
    assert task.shown(task.answers(torch.tensor([0.1, 0.1]), None)) == [("(none)", "")]
    assert task.truth(torch.tensor([1.0, 1.0])) == "cat, dog"
    wrong = task.mistakes(values, torch.tensor([[0, 1], [0, 1]]), 5)
    assert [(each.image, each.truth, each.taken_for) for each in wrong] == [
        (1, "no cat", "cat"),
        (1, "dog", "no dog"),
    ]


@pytest.mark.parametrize(
    "task",
    [
        Classification(("a", "b")),
        MultiLabel(("a", "b")),
        MultiLabel(("a", "b"), (0.25, 0.5)),
        Regression(("a", "b"), (1.0, 2.0), (3.0, 4.0), "l1"),
    ],
)
def test_a_checkpoint_keeps_the_task(task: AnyTask) -> None:
    plain = json.loads(json.dumps(task.to_dict()))
    assert from_dict(plain, task.names) == task
