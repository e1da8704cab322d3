"""`senet ablate`: the variants of the paper's tables, their runs, resume and the table."""

import json
import multiprocessing
import pickle
import re
import shutil
import signal
import threading
import time
import tomllib
from pathlib import Path

import pytest
from cli_tools import run
from tests.helpers.marks import separate_passes

from senet.__main__ import main
from senet.experiments.ablate import ABLATIONS, AblateConfig, folder_of, label_of
from senet.experiments.runs import read_rows
from senet.models.cards import cards
from senet.models.options import SEOptions
from senet.training.loop import Interrupted


def flags(ablation: str, data: Path, out: Path) -> list[str]:
    return [
        "ablate", ablation, "--data", str(data), "--seeds", "2", "--epochs", "1",
        "--batch-size", "8", "--lr", "0.05", "--out", str(out), "--device", "cpu",
        "--no-tune-allocator",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ablated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablated") / "run"
    assert main(flags("nosqueeze", data, out)) == 0
    return out


def test_every_row_of_the_papers_tables_has_a_variant() -> None:
    rows = [name for variants in ABLATIONS.values() for name in variants]
    assert set(rows) == {name for name in cards() if name.startswith("table 1")}
    for name in set(rows):
        assert cards()[name].results[0].top1 > 20
    for ablation, variants in ABLATIONS.items():
        folders = {folder_of(label_of(ablation, name)) for name in variants}
        assert len(folders) == len(variants)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_variants_differ_as_the_papers_do(ablation: str, tmp_path: Path) -> None:
    """What the ablation varies is what our cards of the paper's networks vary."""
    config = AblateConfig(out=tmp_path / "run", ablation=ablation)  # type: ignore[arg-type]
    for name, runs in config.runs().items():
        card, options = cards()[name], runs[0].model_options
        plain = card.network == "resnet50"
        assert runs[0].model == ("resnet8_cifar" if plain else "se_resnet8_cifar")
        for key in ABLATIONS[ablation][name] or ():  # type: ignore[index]
            paper = card.options.get(key, getattr(SEOptions(), key))
            assert options[key] == (tuple(paper) if isinstance(paper, list) else paper)


@separate_passes
def test_each_variant_and_seed_has_a_run(ablated: Path) -> None:
    found = {}
    for path in sorted(ablated.glob("*/seed*")):
        config = tomllib.loads((path / "config.toml").read_text())
        found[f"{path.parent.name}/{path.name}"] = (config["model"], config["model_options"])
        assert len(read_rows(path / "metrics.csv")) == 1
    se = {"reduction": 4, "gate": "identity_sigmoid"}
    assert found == {
        **{f"plain/seed{seed}": ("resnet8_cifar", {}) for seed in (0, 1)},
        **{
            f"nosqueeze/seed{seed}": ("se_resnet8_cifar", {**se, "squeeze": "none"})
            for seed in (0, 1)
        },
        **{f"se/seed{seed}": ("se_resnet8_cifar", {**se, "squeeze": "avg"}) for seed in (0, 1)},
    }
    results = json.loads((ablated / "results.json").read_text())
    assert [(label, variant["card"]) for label, variant in results["variants"].items()] == [
        ("plain", "table 10, plain"),
        ("NoSqueeze", "table 16, NoSqueeze"),
        ("SE", "table 10, r=16"),
    ]
    for label, variant in results["variants"].items():
        rows = [
            read_rows(ablated / folder_of(label) / f"seed{seed}" / "metrics.csv") for seed in (0, 1)
        ]
        assert variant["top1_error"] == pytest.approx([100 - row[-1]["top1"] for row in rows])
    plain, without, se_block = results["variants"].values()
    assert results["base"] == "plain"
    assert plain["minus_base"] is None
    a, b = (y - x for x, y in zip(plain["top1_error"], without["top1_error"], strict=True))
    half = 12.7062 * abs(a - b) / 2  # Student's t of one degree of freedom, times |a - b| / √2 / √2
    interval = {"mean": (a + b) / 2, "low": (a + b) / 2 - half, "high": (a + b) / 2 + half}
    assert without["minus_base"] == pytest.approx(interval, rel=1e-4, abs=1e-9)
    assert plain["parameters"] < without["parameters"] == se_block["parameters"]
    assert plain["multiply_adds"] < se_block["multiply_adds"] < without["multiply_adds"]


def in_two_processes(ablated: Path, out: Path, *missing: str) -> Path:
    """A copy that lacks some runs, which two processes will train."""
    shutil.copytree(ablated, out)
    config = out / "config.toml"
    config.write_text(config.read_text().replace("processes = 1", "processes = 2"))
    for folder in missing:
        shutil.rmtree(out / folder)
    return out


@separate_passes
def test_resume_trains_what_is_missing_in_processes_too(
    ablated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = in_two_processes(ablated, tmp_path / "copy", "nosqueeze/seed0", "se/seed1")
    kept = (out / "plain" / "seed0" / "metrics.csv").stat().st_mtime_ns
    found = run(capsys, "ablate", "--resume", out)
    assert found.code == 0, found.err
    assert (out / "plain" / "seed0" / "metrics.csv").stat().st_mtime_ns == kept
    lines = [line for line in found.out.splitlines() if "top-1" in line and "seed" in line]
    assert {line.split(":")[0] for line in lines if "of 2)" in line} == {
        "nosqueeze seed 0",
        "se seed 1",
    }
    assert "NoSqueeze" in found.out
    assert " ± " in found.out
    assert "22.93" in found.out  # the paper's
    assert "minus plain" in found.out
    assert re.search(r"[+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", found.out)
    before, after = (json.loads((f / "results.json").read_text()) for f in (ablated, out))
    for name, variant in before["variants"].items():
        assert after["variants"][name]["top1_error"] == pytest.approx(variant["top1_error"], abs=13)


@separate_passes
def test_sigterm_to_one_process_stops_all(
    ablated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = in_two_processes(ablated, tmp_path / "copy", "se/seed1")
    others = set(multiprocessing.active_children())  # of other tests

    def stop_early() -> None:
        while not set(multiprocessing.active_children()) - others:
            time.sleep(0.01)
        # While the worker still imports PyTorch. This thread takes the signal: the main one, which
        # must hear of it, waits on.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_early, daemon=True)
    stopper.start()
    found = run(capsys, "ablate", "--resume", out)
    stopper.join()
    assert found.code == 128 + signal.SIGTERM
    assert found.err == f"senet ablate: stopped; to go on: senet ablate --resume {out}\n"
    assert not set(multiprocessing.active_children()) - others
    assert not (out / "se" / "seed1").exists()


def test_a_stop_in_a_worker_keeps_its_signal() -> None:
    stopped = pickle.loads(pickle.dumps(Interrupted(Path("run"), signal.SIGINT)))
    assert (str(stopped.run), stopped.number) == ("run", signal.SIGINT)
    assert str(stopped) == "stopped; to go on exactly here: senet train --resume run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("name an ablation", "reduction")),
        (("reductions",), ("reductions",)),
        (("reduction",), ("--out",)),
        (("reduction", "--reduction", "4", "--out", "x"), ("leave out reduction", "varies")),
        (("squeeze", "--processes", "0", "--out", "x"), ("processes", "0")),
        (
            ("integration", "--model", "se_mobilenet", "--out", "x"),
            ("se_mobilenet has no variant", "SE-PRE"),
        ),
        (("squeeze", "--resume", "nothing"), ("leave out --ablation",)),
        (("--resume", "nothing"), ("nothing is no folder of senet ablate",)),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "ablate", *arguments).refused("ablate", *words)


@separate_passes
def test_a_comparison_is_no_ablation(ablated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "compare", "--resume", ablated).refused("compare", "not that of senet compare")
