"""`senet bench`: what it measures, records and prints. Nothing here judges a time."""

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import run

from senet.anatomy import excitations
from senet.bench import inference as bench_inference
from senet.bench import networks as bench_networks
from senet.bench import ops as bench_ops
from senet.bench import timing
from senet.bench import train as bench_train
from senet.bench.networks import OURS, OURS_PLAIN, entrants
from senet.bench.setting import Setting
from senet.bench.timing import Case, Contestant
from senet.data import Preprocessing
from senet.errors import SenetError, UserError
from senet.networks.create import create_model

TINY = (2, 16, 4, 4)
CPU = Setting()
TORCHVISION = "torchvision resnet50 eager"


def counted(log: list[str], name: str) -> Contestant:
    return Contestant(name, lambda: log.append(name))


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_PAUSE", 0.0)
    log: list[str] = []
    case = Case("claim", "case", lambda: [counted(log, "a"), counted(log, "b")])
    found = timing.measure(case, rounds=3, warmup=2)
    assert log == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert [(m.contestant, m.rounds, m.unit) for m in found] == [("a", 3, "ms"), ("b", 3, "ms")]


def test_short_calls_are_repeated_within_a_round() -> None:
    log: list[str] = []
    timing.measure(Case("claim", "case", lambda: [counted(log, "a")]), rounds=1, warmup=1)
    assert len(log) > 100


def test_quantiles_and_ratios_of_the_same_round() -> None:
    assert timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == (1.0, 2.5, 4.0)
    values = {"ours": (1.0, 2.0, 4.0), "theirs": (3.0, 2.0, 8.0)}
    ours, theirs = timing.summarize("claim", "case", "ms", values)
    assert ours.ratio == 1.0
    assert theirs.ratio == 2.0  # of 3, 1, 2
    assert theirs.quantiles[1] == 3.0
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(timing.geometric_mean([]))


def test_cases_are_chosen_by_name() -> None:
    cases = [Case("tail", "2×16×4×4", list), Case("SE alone", "2×16×4×4", list)]
    assert timing.chosen(cases, None) == cases
    assert timing.chosen(cases, "tail") == cases[:1]
    assert timing.chosen(cases, "alone 2x16") == cases[1:]
    with pytest.raises(UserError, match=r"'tai1' matches no case; there are: tail 2×16×4×4, SE"):
        timing.chosen(cases, "tai1")


def test_results_file(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    values = {"ours": (1.0,), "theirs": (2.5,)}
    rows = timing.summarize("claim", "case", "ms", values)
    where = timing.environment("senet bench ops", "tuned")
    timing.append_results(path, rows, where)
    timing.append_results(path, rows[:1], where)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["contestant"] for row in read] == ["ours", "theirs", "ours"]
    assert read[1]["ratio"] == read[1]["q50"] == "2.5"
    assert read[1]["torch"] == torch.__version__.partition("+")[0]
    assert read[1]["threads"] == str(torch.get_num_threads())
    for column in ("date", "cpu", "isa", "load", "timm", "python"):
        assert read[1][column], column
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="other columns"):
        timing.append_results(path, rows, where)
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    "build",
    [
        lambda: bench_ops.tail_contestants(TINY, CPU, compiled=False),
        lambda: bench_ops.se_contestants(TINY, CPU, compiled=False),
        lambda: bench_ops.bn_relu_contestants(TINY, CPU),
    ],
)
def test_contestants_compute_the_same(
    build: Callable[[], list[Contestant]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights and maps all peers have our gradients: a fair comparison."""
    monkeypatch.setattr(bench_ops, "REDUCTION", 2)  # timm rounds widths up to a multiple of 8
    monkeypatch.setattr(bench_ops, "_contestant", _seeded(bench_ops._contestant))
    ours, *peers, copy = build()
    assert copy.name == bench_ops.COPY
    expected = ours.run()
    assert isinstance(expected, tuple)
    for peer in peers:
        found = peer.run()
        assert isinstance(found, tuple)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-4, atol=1e-5)


def _seeded(make: Callable[..., Contestant]) -> Callable[..., Contestant]:
    def contestant(name: str, module: torch.nn.Module, *rest: object) -> Contestant:
        torch.manual_seed(0)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        torch.manual_seed(1)
        return make(name, module, *rest)

    return contestant


def test_conclusions_of_the_operators() -> None:
    def rows(claim: str, shape: str, **values: float) -> list[timing.Measurement]:
        named = {"senet": values["ours"], "timm eager": values["timm"]}
        named["copy of the map"] = values["copy"]
        lists = {name: (value,) for name, value in named.items()}
        return timing.summarize(claim, shape, "ms", dict(lists))

    found = [
        *rows("tail", "1×1×10×10", ours=11.0, timm=44.0, copy=2.0),
        *rows("tail", "1×1×20×20", ours=1.0, timm=9.0, copy=1.0),
        *rows("tail", "2×16×4×4", ours=1.0, timm=1.0, copy=1.0),  # the cost of a call only
        *rows("scaling in N", "1×1×1×10", ours=1e-5, timm=1.0, copy=1.0),
    ]
    lines = bench_ops.conclusions(found)
    assert "6.00 times as fast as timm eager" in lines[0]
    assert "lowest 4.00 at 1×1×10×10" in lines[0]
    bounds = [line for line in lines if "11 passes" in line]
    assert len(bounds) == 2
    assert "tail at 1×1×10×10: 1.00 times" in bounds[0]
    assert "ns an element 1.00 (1×1×1×10)" in lines[-1]


def test_training_steps_train() -> None:
    (case,) = bench_train.cases([2], compiled=False, image_size=32)
    contestants = case.build()
    networks = entrants("cpu", compiled=False)
    assert [c.name for c in contestants] == list(networks)
    assert len(networks) == len(entrants("cpu", compiled=True)) - 1
    model = networks[OURS].make()
    before = [p.detach().clone() for p in model.parameters()]
    bench_train.training_step(model, 2, image_size=32)()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(p.grad is None for p in model.parameters())
    contestants[0].run()


def test_conclusions_of_the_training_step() -> None:
    step = {OURS: (1.0,), OURS_PLAIN: (0.98,)}
    peers = {TORCHVISION: (1.3,)}
    times = timing.summarize("training step", "batch 8", "ms", step | peers)
    memory = timing.summarize("peak memory, step", "batch 8", "MiB", step | peers)
    lines = bench_train.conclusions([*times, *memory])
    assert "takes +2.0% time over senet resnet50" in lines[0]
    assert "is 1.300 times as fast as torchvision" in lines[1]
    assert "needs 76.9% of torchvision" in lines[3]


def test_any_networks_training_step() -> None:
    (case,) = bench_train.cases_of(["timm:test_efficientnet"], [2], compiled=False, image_size=32)
    assert case.name == "timm:test_efficientnet, batch 2"
    contestants = case.build()
    fused = "senet.fuse timm:test_efficientnet"
    names = [fused, f"{fused} without SE", "timm:test_efficientnet eager"]
    assert [c.name for c in contestants] == names
    for contestant in contestants:
        contestant.run()
    networks = bench_networks.entrants_of("timm:test_efficientnet", compiled=True)
    assert list(networks) == [*names, "timm:test_efficientnet compiled"]
    assert len(excitations(networks[fused].make())) == 2
    assert not excitations(networks[f"{fused} without SE"].make())
    values = {name: (value,) for name, value in zip(names, (1.0, 0.97, 1.6), strict=True)}
    found = timing.summarize("training step", "batch 2", "ms", values)
    assert bench_train.conclusions_of_models(found) == [
        "training step, batch 2: senet.fuse: SE costs +3.1%",
        "training step, batch 2: senet.fuse is 1.600 times as fast as timm:test_efficientnet eager",
    ]
    with pytest.raises(UserError, match=r"takes timm:NAME, .* not resnet50"):
        bench_train.cases_of(["resnet50"], [2])


def test_memory_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SenetError, match="senet resnet50 failed: no message"):
        bench_train.peak_memory(OURS_PLAIN, 2, tuned=False)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = bench_ops.cases([CPU], [TINY], [("scaling in N", TINY)], compiled=False)
    monkeypatch.setattr(bench_ops, "cases", lambda settings, compiled: cases)
    path = tmp_path / "results.csv"
    flags = ("--rounds", 2, "--warmup", 1, "--no-tune-allocator", "--results", path)
    found = run(capsys, "bench", "ops", *flags)
    assert found.code == 0, found.err
    assert "copy of the map" in found.out
    assert "scaling in N: ns an element" in found.out
    assert len(path.read_text().splitlines()) == 1 + 3 + 3 + 4 + 4 + 3 + 3 + 2


def test_inference_of_all_engines_but_the_slow_to_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_PAUSE", 0.0)
    monkeypatch.setattr(bench_inference, "ENGINES", ("eager",))
    flags = ("--models", "se_resnet8_cifar", "--batch-sizes", "1,3", "--rounds", 2, "--warmup", 1)
    found = run(capsys, "bench", "inference", *flags, "--no-compile", "--no-tune-allocator")
    assert found.code == 0, found.err
    for batch in (1, 3):
        assert f"se_resnet8_cifar, batch {batch}" in found.out
    for name in ("senet.optimize se_resnet8_cifar", "senet.optimize resnet8_cifar",
                 "eager se_resnet8_cifar", "eager resnet8_cifar"):  # fmt: skip
        assert f" {name} " in found.out
    lines = [line for line in found.out.splitlines() if "SE costs" in line]
    assert len(lines) == 2
    assert "as fast as the fastest peer (eager " in lines[0]


def test_inference_of_the_users_own_networks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_PAUSE", 0.0)
    monkeypatch.setattr(bench_inference, "ENGINES", ("eager", "ONNX Runtime"))
    trained = tmp_path / "trained"
    model = create_model("se_resnet8_cifar", num_classes=3, in_channels=1)
    model.preprocessing = Preprocessing(28, None, (0.5,), (0.5,), channels=1).to_dict()
    model.save_pretrained(trained)
    code = tmp_path / "mine.py"
    code.write_text(
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 8), nn.AvgPool2d(28), nn.Flatten())\n"
    )
    names = f"{trained},{code}:small"
    flags = ("--models", names, "--batch-sizes", 2, "--rounds", 1, "--warmup", 1, "--no-compile")
    found = run(capsys, "bench", "inference", *flags, "--no-tune-allocator")
    assert found.code == 0, found.err
    ours, other = found.out.splitlines()[-2:]
    assert ours.startswith(f"{trained}, batch 2: senet.optimize: SE costs ")
    assert f" resnet8_cifar for {trained})" in ours
    assert other.startswith(f"{code}:small, batch 2: senet.optimize: ")
    assert other.endswith(f" {code}:small)")
    assert "SE costs" not in other


def test_peers_of_inference_are_timms_networks() -> None:
    found = bench_inference.contestants("se_resnet50", 1, engines=["eager"])
    assert [each.name for each in found] == [
        "senet.optimize se_resnet50",
        "senet.optimize resnet50",
        "eager timm seresnet50",
        "eager timm resnet50",
    ]
    with pytest.raises(UserError, match=r"engines must be some of .* got 'fast'"):
        bench_inference.cases(["se_resnet50"], [1], engines=["fast"])


def test_conclusions_of_inference() -> None:
    values = {
        "senet.optimize se_resnet50": (2.0,),
        "senet.optimize resnet50": (1.9,),
        "eager timm seresnet50": (6.0,),
        "ONNX Runtime timm seresnet50": (3.0,),
        "ONNX Runtime timm resnet50": (2.5,),
    }
    rows = timing.summarize("inference", "se_resnet50, batch 1", "ms", values)
    assert bench_inference.conclusions(rows) == [
        "se_resnet50, batch 1: senet.optimize: SE costs +5.3%, 1.25× as fast as the fastest plain "
        "peer (ONNX Runtime timm resnet50), 1.25× as fast as the fastest peer (ONNX Runtime timm "
        "resnet50)"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ops", "--rounds", 0), ("--rounds", "0")),
        (("ops", "--warmup", 0), ("--warmup", "0")),
        (("ops", "--batch-sizes", 8), ("--batch-sizes", "train")),
        (("train", "--batch-sizes", "8,1"), ("--batch-sizes", "at least 2")),
        (("inference", "--batch-sizes", "8,0"), ("--batch-sizes", "at least 1")),
        (("inference", "--models", "resnet50"), ("resnet50 has no SE", "se_resnet50")),
        (("inference", "--models", "se_resnet5O"), ("unknown model", "se_resnet50")),
        (("train", "--models", "se_resnet50"), ("--models", "timm:NAME", "not se_resnet50")),
        (("ops", "--models", "se_resnet50"), ("--models", "inference", "train")),
        (("everything",), ("everything",)),
    ],
)
def test_bad_input(
    arguments: tuple[object, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "bench", *arguments).refused("bench", *words)
