"""What `fold_gates` reports, value by value."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import senet
from senet.gates.fold import FoldedBlock, FoldReport, Measured, fold_gates
from senet.gates.record import record_gates

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def block(constant: Tensor) -> senet.SqueezeExcitation:
    """A block whose gates are constant where `constant` is true."""
    se = senet.SqueezeExcitation(6, hidden=2)
    with torch.no_grad():
        se.fc2.weight.normal_(0, 3)
        se.fc2.weight[constant] = 0
        se.fc1.bias.fill_(1)
    return se


ALL, HALF, NONE = torch.ones(6).bool(), torch.arange(6) % 2 == 0, torch.zeros(6).bool()


def folded(*layers: nn.Module, **options: object) -> FoldReport:
    model = nn.Sequential(*layers).eval()
    statistics = record_gates(model, [X])
    return fold_gates(model, statistics, tolerance=1e-6, example_input=X[:1], **options)


def test_each_kind_of_block():
    conv = nn.Conv2d(6, 6, 1)
    report = folded(
        *(nn.Conv2d(3, 6, 1), block(ALL), nn.Tanh()),
        *(conv, block(HALF), nn.Tanh()),
        *(nn.Conv2d(6, 6, 1), block(NONE), nn.Sigmoid()),
        *(block(ALL), nn.Tanh()),
    )
    assert report.blocks == (
        FoldedBlock("1", 6, 6, "removed", "before", 0.0),
        FoldedBlock("4", 6, 3, "partial", "before", 0.0),
        FoldedBlock("7", 6, 0, "kept", "", 0.0),
        FoldedBlock("9", 6, 6, "constant", "", 0.0, "no layer around it could take the factors"),
    )
    assert report.structure.keys() == {"1", "4", "9"}
    assert report.structure["9"] == {"kind": "constant", "channels": 6}
    assert report.structure["1"] == {"kind": "removed"}
    assert (report.restored, report.drop, report.tolerance) == ((), None, 1e-6)


def test_why_some_gates_are_kept():
    twice = block(HALF)
    report = folded(nn.Conv2d(3, 6, 1), twice, nn.Tanh(), twice)
    assert report.blocks == (FoldedBlock("1", 6, 0, "kept", "", 0.0, "it runs more than once"),)
    report = folded(nn.Conv2d(3, 6, 1), nn.Sigmoid(), block(HALF), nn.Tanh())
    why = "no layer around it could take the factors"
    assert report.blocks == (FoldedBlock("2", 6, 0, "kept", "", 0.0, why),)
    whole = folded(nn.Conv2d(3, 6, 1), block(HALF), nn.Tanh(), partial=False)
    assert whole.blocks == (FoldedBlock("1", 6, 0, "kept", "", 0.0),)


def test_both_networks_are_measured(monkeypatch):
    """Accuracy and loss over all images; a clock that ticks once a look gives the speed."""
    ticks = itertools.count()
    monkeypatch.setattr("senet.gates.fold.time.perf_counter", lambda: float(next(ticks)))
    layers = (
        *(nn.Conv2d(3, 6, 1), block(ALL), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(6, 3),
    )
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    report = folded(*layers, loader=[(X[:4], labels[:4]), (X[4:], labels[4:])])
    with torch.no_grad():
        logits = nn.Sequential(*layers).eval()(X)
    top1 = 100 * float((logits.argmax(1) == labels).float().mean())
    loss = float(F.cross_entropy(logits, labels))
    convolution, linear, gates = 64 * 3 * 6, 6 * 3, 2 * 6 * 2
    assert report.before == Measured(
        parameters=(3 * 6 + 6) + (6 * 2 + 2 + 2 * 6 + 6) + (6 * 3 + 3),
        multiply_adds=convolution + gates + linear,
        top1=pytest.approx(top1),
        loss=pytest.approx(loss, rel=1e-5),
        images_per_second=3.0,  # 6 in two batches of a second
    )
    assert report.after == Measured(
        parameters=(3 * 6 + 6) + (6 * 3 + 3),
        multiply_adds=convolution + linear,
        top1=pytest.approx(top1),
        loss=pytest.approx(loss, rel=1e-5),
        images_per_second=3.0,
    )
    assert report.drop == 0


def rows(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_tables():
    blocks = (
        FoldedBlock("a", 1024, 1024, "removed", "before", 0.01234),
        FoldedBlock("b", 8, 0, "kept", "", 0.0, "it runs more than once"),
        FoldedBlock("c", 8, 0, "kept", "", 0.0),
    )
    before, after = Measured(12345, 6789, 91.236, 0.43219, 123.4), Measured(12000, 6700)
    report = FoldReport(nn.Identity(), blocks, before, after, ("c",), 0.01, {})
    first, second = report.tables()
    assert rows(first) == [
        ("a", "1,024", "1,024", "1.23", "removed, into the layer before"),
        ("b", "8", "0", "0.00", "kept (it runs more than once)"),
        ("c", "8", "0", "0.00", "kept: the accuracy fell too far"),
    ]
    assert rows(second) == [
        ("before", "12,345", "6,789", "91.24", "0.4322", "123"),
        ("after", "12,000", "6,700", "", "", ""),
    ]
    assert report.drop is None
