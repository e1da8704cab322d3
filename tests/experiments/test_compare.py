"""`senet compare`: order of the runs, results, resume, gates."""

import json
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import CLASSES, run

from senet.__main__ import main
from senet.checkpoint.files import open_checkpoint
from senet.errors import UserError
from senet.experiments import compare
from senet.experiments.compare import QUICK_EPOCHS, CompareConfig
from senet.experiments.runs import read_rows
from senet.networks.anywhere import open_source
from senet.training.config import RunConfig
from senet.training.loop import Interrupted

NET = """
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

def small(num_classes=10, se=True):
    block = SqueezeExcitation(8, 4, activation=nn.SiLU) if se else nn.Identity()
    return nn.Sequential(
        Conv2dNormActivation(3, 8, 3, activation_layer=nn.SiLU), block,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )

def plain(num_classes=10):
    return small(num_classes, se=False)

class Inline(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.conv(x)
        x = x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))

def inline(num_classes=10):
    return Inline(num_classes)
"""


def flags(data: Path, out: Path) -> list[str]:
    return [
        "compare", "--data", str(data), "--seeds", "2", "--epochs", "2", "--batch-size", "8",
        "--lr", "0.05", "--out", str(out), "--device", "cpu", "--no-tune-allocator",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "run"
    assert main(flags(data, out)) == 0
    return out


def results(folder: Path) -> dict[str, object]:
    """results.json without the timings, which differ from run to run."""
    content = json.loads((folder / "results.json").read_text())
    for network in ("plain", "se"):
        del content[network]["images_per_second"], content[network]["seconds"]
    del content["speed_ratio"]
    return content


def test_each_network_and_seed_has_a_run(compared: Path) -> None:
    configs = {
        path: tomllib.loads((compared / path / "config.toml").read_text())
        for path in ("plain/seed0", "plain/seed1", "se/seed0", "se/seed1")
    }
    assert {path: (c["model"], c["seed"]) for path, c in configs.items()} == {
        "plain/seed0": ("resnet8_cifar", 0),
        "plain/seed1": ("resnet8_cifar", 1),
        "se/seed0": ("se_resnet8_cifar", 0),
        "se/seed1": ("se_resnet8_cifar", 1),
    }
    assert configs["plain/seed0"]["recipe"] == configs["se/seed1"]["recipe"]
    assert configs["se/seed0"]["model_options"] == {"reduction": 4, "gate": "identity_sigmoid"}
    assert configs["plain/seed0"]["model_options"] == {}
    for path in configs:
        assert (compared / path / "checkpoints" / "last" / "model.safetensors").is_file()
        assert list((compared / path / "tensorboard").iterdir())


def test_networks_are_trained_alternately(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, *flags(data, tmp_path / "run"))
    assert found.code == 0, found.err
    order = [line.split(": epoch 1/2")[0] for line in found.out.splitlines() if "epoch 1/2" in line]
    assert order == [
        "resnet8_cifar seed 0",
        "se_resnet8_cifar seed 0",
        "resnet8_cifar seed 1",
        "se_resnet8_cifar seed 1",
    ]
    assert "parameters" in found.out
    assert "points of top-1 (SE minus plain)" in found.out
    assert "over 2 paired seeds" in found.out
    assert found.out.splitlines()[-1].endswith(str(tmp_path / "run"))


def test_results_are_those_of_the_runs(compared: Path) -> None:
    content = json.loads((compared / "results.json").read_text())
    for kind in ("plain", "se"):
        for seed in (0, 1):
            rows = read_rows(compared / kind / f"seed{seed}" / "metrics.csv")
            assert content[kind]["top1"][seed] == rows[-1]["top1"]
        assert np.sum(content[kind]["confusion"]) == 2 * 12  # both seeds, 12 validation images
        right = np.trace(content[kind]["confusion"]) / 24
        assert 100 * right == pytest.approx(np.mean(content[kind]["top1"]))
    assert content["classes"] == list(CLASSES)
    assert content["se"]["parameters"] > content["plain"]["parameters"]
    assert {name: np.shape(gates) for name, gates in content["gates"].items()} == {
        "layer1.0.se": (3, 16),
        "layer2.0.se": (3, 32),
        "layer3.0.se": (3, 64),
    }


def test_files(compared: Path) -> None:
    for name in ("learning_curves", "confusion_matrix", "gates_per_stage"):
        for kind in ("png", "svg"):
            assert (compared / "figures" / f"{name}.{kind}").stat().st_size > 1000
    assert "<table>" in (compared / "report.html").read_text()


def test_a_killed_comparison_resumes_to_the_same_results(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(compared, killed)
    # As if killed after one epoch of plain seed 1: that run's last checkpoint is the first
    # epoch's, and the runs behind it do not exist.
    shutil.rmtree(killed / "se" / "seed1")
    shutil.rmtree(killed / "figures")
    (killed / "results.json").unlink()
    interrupted = killed / "plain" / "seed1"
    shutil.rmtree(interrupted / "checkpoints" / "last")
    (interrupted / "checkpoints" / "previous").rename(interrupted / "checkpoints" / "last")
    lines = (interrupted / "metrics.csv").read_text().splitlines(keepends=True)
    (interrupted / "metrics.csv").write_text("".join(lines[:2]))
    kept = killed / "plain" / "seed0" / "checkpoints" / "last" / "model.safetensors"
    before = kept.stat().st_mtime_ns

    found = run(capsys, "compare", "--resume", killed, "--no-tune-allocator")
    assert found.code == 0, found.err
    assert "resnet8_cifar seed 0" not in found.out
    assert "resnet8_cifar seed 1: epoch 2/2" in found.out
    assert kept.stat().st_mtime_ns == before
    assert results(killed) == results(compared)


def test_interrupt_names_the_command_that_resumes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    from senet.support.progress import EpochLines

    presses = iter([signal.SIGINT])  # once: a second one would stop without a checkpoint

    def press_ctrl_c(self: EpochLines, images: int, loss: float, lr: float) -> None:
        for number in presses:
            signal.raise_signal(number)

    out = tmp_path / "run"
    monkeypatch.setattr(EpochLines, "step", press_ctrl_c)
    found = run(capsys, *flags(data, out))
    assert found.code == 130
    assert found.err.splitlines()[-1] == (
        f"senet compare: stopped; to go on: senet compare --resume {out}"
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted(Path("run"))])
def test_a_stopped_worker_begins_nothing_else(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits in the pool's queue would be trained to its end before Ctrl-C took effect."""
    begun = []

    def begin(run: RunConfig) -> None:
        begun.append(run)
        raise stop

    monkeypatch.setattr(compare, "begin_or_go_on", begin)
    monkeypatch.setattr(compare, "_stop", None)
    runs = CompareConfig(out=tmp_path / "run").runs()["plain"][:2]
    for run_config in runs:
        with pytest.raises(type(stop)):
            compare._train(run_config)
    assert begun == runs[:1]


ORPHAN = """
import multiprocessing, pathlib, sys, time
from senet.experiments import compare
from senet.training.loop import Interrupted, _stop_signals

folder = pathlib.Path(sys.argv[1])

def until_a_signal(run):
    with _stop_signals() as stopped:
        (folder / "begun").touch()
        while not stopped.requested:
            time.sleep(0.01)
    (folder / "checkpoint").touch()
    raise Interrupted(folder)

def work():
    compare.begin_or_go_on = until_a_signal
    compare._begin_worker(1, folder, asked)
    try:
        compare._train(folder)
    except Interrupted:
        time.sleep(60)  # as a pool's worker, which waits for its next job

fork = multiprocessing.get_context("fork")
asked = fork.Event()
fork.Process(target=work).start()
"""


def test_a_killed_comparison_leaves_no_worker_training(tmp_path: Path) -> None:
    """SIGKILL reaches the workers' parent alone; they write a checkpoint and end."""
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, tmp_path], stdout=subprocess.PIPE)
    with parent:
        while not (tmp_path / "begun").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        parent.kill()
        parent.communicate(timeout=30)  # the output ends with the last process that holds it
    assert (tmp_path / "checkpoint").exists()


def test_a_killed_worker_is_told_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Killed(ProcessPoolExecutor):
        def submit(self, *_: object) -> Future[list[str]]:  # type: ignore[override]
            job: Future[list[str]] = Future()
            job.set_exception(BrokenProcessPool("abruptly"))
            return job

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Killed)
    out = tmp_path / "run"
    found = run(capsys, *flags(data, out), "--processes", "2")
    assert found.code == 1
    assert found.err == (
        "senet compare: a process that trained was killed, perhaps for want of memory; to go on: "
        f"senet compare --resume {out}\n"
    )


def test_config_of_a_comparison_reruns_it(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    found = run(
        capsys, "compare", "--config", compared / "config.toml", "--out", again,
        "--no-tune-allocator",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert results(again) == results(compared)


def test_what_is_taken_away_from_a_recipe_stays_away(tmp_path: Path) -> None:
    """TOML has no None: the file says it as the flag does."""
    taken = {"grad_clip": None, "ema_decay": None, "randaugment": None}
    config = CompareConfig(
        out=tmp_path, recipe="finetune", recipe_options=taken | {"crop": "none"},
        data_options={"val_fraction": None},
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(config.to_toml())
    again = CompareConfig.of_folder(tmp_path, refused={})
    assert again.recipe_options == config.recipe_options
    assert again.training_recipe() == config.training_recipe()
    assert config.training_recipe().grad_clip is None
    assert 'grad_clip = "none"' in config.to_toml()


def test_the_recipe_quick_brings_what_a_short_training_needs(tmp_path: Path) -> None:
    quick = CompareConfig(out=tmp_path)
    assert quick.training_recipe().epochs == QUICK_EPOCHS
    assert quick.runs()["se"][0].model_options == {"reduction": 4, "gate": "identity_sigmoid"}
    given = CompareConfig(out=tmp_path, se_options={"gate": "tanh"}, recipe_options={"epochs": 3})
    assert given.training_recipe().epochs == 3
    assert given.runs()["se"][0].model_options == {"reduction": 4, "gate": "tanh"}
    cifar = CompareConfig(out=tmp_path, model="se_resnet20_cifar", recipe="cifar")
    assert cifar.training_recipe().epochs == 200
    assert cifar.runs()["se"][0].model_options == {}
    assert cifar.runs()["plain"][0].model == "resnet20_cifar"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "resnet9_cifar"}, ["unknown model", "did you mean"]),
        ({"--recipe": "quack"}, ["unknown recipe", "did you mean 'quick'?"]),
        ({"--data": "embeded"}, ["unknown data set", "did you mean 'embedded'?"]),
        ({"--seeds": "0"}, ["seeds", "got 0"]),
        ({"--epochs": "0"}, ["epochs", "got 0"]),
        ({"--batch-size": "1000"}, ["batch_size 1000"]),
    ],
)
def test_bad_values(
    changes: dict[str, str],
    words: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = flags(data, out)
    for name, value in changes.items():
        if name not in arguments:
            arguments += [name, value]
        arguments[arguments.index(name) + 1] = value
    run(capsys, *arguments).refused("compare", *words)
    assert not out.exists()


def test_existing_folder(data: Path, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, *flags(data, compared))
    found.refused("compare", str(compared), f"senet compare --resume {compared}")


def test_unwritable_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    run(capsys, *flags(data, out)).refused("compare", str(out))


def test_out_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "compare", "--no-tune-allocator").refused("compare", "--out")


def test_resume_refuses_flags_and_other_folders(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value in (("--seeds", 3), ("--gate", "tanh"), ("--workers", 0), ("--out", tmp_path)):
        found = run(capsys, "compare", "--resume", compared, flag, value, "--no-tune-allocator")
        found.refused("compare", flag)
    found = run(capsys, "compare", "--resume", tmp_path, "--no-tune-allocator")
    found.refused("compare", str(tmp_path), "no folder of senet compare")
    run_folder = compared / "se" / "seed0"
    found = run(capsys, "compare", "--resume", run_folder, "--no-tune-allocator")
    found.refused("compare", str(run_folder), "senet train --resume")
    (tmp_path / "config.toml").write_text("seeds 3")
    found = run(capsys, "compare", "--resume", tmp_path, "--no-tune-allocator")
    found.refused("compare", "config.toml", "not a TOML file")


def test_compare_config_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seeds must be at least 1"):
        CompareConfig(out=tmp_path, seeds=0)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Networks in a file of the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def test_a_foreign_network_against_itself_without_se(
    data: Path, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    found = run(capsys, *flags(data, out), "--model", "net.py:small")
    assert found.code == 0, found.err
    content = json.loads((out / "results.json").read_text())
    assert [content[kind]["name"] for kind in ("plain", "se")] == [
        *("net.py:small without SE", "net.py:small")
    ]
    assert content["se"]["parameters"] - content["plain"]["parameters"] == 8 * 4 * 2 + 4 + 8
    assert {name: np.shape(gates) for name, gates in content["gates"].items()} == {"1": (3, 8)}
    assert "net.py:small without SE seed 1" in found.out
    for kind, options in (("plain", {"without_se": True}), ("se", {})):
        config = tomllib.loads((out / kind / "seed0" / "config.toml").read_text())
        assert config["model"] == f"{net}:small"
        assert config.get("model_options", {}) == options
    # Its runs are opened, and the comparison goes on, from anywhere.
    monkeypatch.chdir("/")
    opened = open_checkpoint(out / "plain" / "seed0").model
    assert opened.config["options"] == {"without_se": True}
    assert not any(name.startswith("1.") for name in opened.state_dict())
    shutil.rmtree(out / "se" / "seed1")
    assert run(capsys, "compare", "--resume", out, "--no-tune-allocator").code == 0
    assert results(out)["se"] == {k: content["se"][k] for k in results(out)["se"]}


def test_a_foreign_run_without_se_is_trained_again_from_its_config(
    data: Path, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    found = run(
        capsys, "train", "--model", "net.py:small", "--without-se", "--data", data, "--epochs", 1,
        "--batch-size", 8, "--out", first, "--device", "cpu", "--no-tune-allocator",
    )  # fmt: skip
    assert found.code == 0, found.err
    again = tmp_path / "again"
    found = run(capsys, "train", "--config", first / "config.toml", "--out", again)
    assert found.code == 0, found.err
    assert (first / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()


@pytest.mark.parametrize("name", ["FILE:small", "timm:test_efficientnet"])
def test_both_start_from_the_same_weights(name: str, net: Path) -> None:
    weights = []
    channels = 1 if name.startswith("timm") else 3
    for options in ({}, {"without_se": True}):
        torch.manual_seed(0)
        model = open_source(name.replace("FILE", str(net)), in_channels=channels, **options)
        weights.append(model.state_dict())
    assert weights[1].keys() < weights[0].keys()
    assert all(torch.equal(value, weights[0][name]) for name, value in weights[1].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model": "net.py:plain"}, ["net.py:plain", "no SE blocks", "senet insert"]),
        ({"--model": "net.py:inline"}, ["mul", "inside of a larger", "FILE.py:FUNCTION"]),
        ({"--model": "net.py:other"}, ["no function 'other'"]),
        ({"--model": "timm:nothing"}, ["timm has no model 'nothing'"]),
        ({"--model": "net.py:small", "--gate": "tanh"}, ["without gate", "FILE.py:FUNCTION"]),
        ({"--model": "net.py:small", "--width": "2"}, ["without width", "senet models"]),
        ({"--without-se": None}, ["without_se"]),
    ],
)
def test_foreign_networks_that_are_refused(
    changes: dict[str, str | None], words: list[str], data: Path, net: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    more = [text for pair in changes.items() for text in pair if text is not None]
    run(capsys, *flags(data, out), *more).refused("compare", *words)
    assert not out.exists()


def test_ablations_are_of_our_own_networks(
    data: Path, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(
        capsys, "ablate", "squeeze", "--model", "net.py:small", "--data", data, "--out",
        tmp_path / "run", "--no-tune-allocator",
    )  # fmt: skip
    found.refused("ablate", "networks of this package", "net.py:small")
