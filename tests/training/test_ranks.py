"""Two processes that train together: killed, hung, stopped, resized, locked out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from senet.data import Augmentation
from senet.errors import UserError
from senet.training.checkpoint import open_checkpoint
from senet.training.config import RunConfig
from senet.training.loop import resume, train
from senet.training.ranks import locked
from senet.training.session import Session

Make = Callable[..., RunConfig]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def driver(tiny_config: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs ranks_driver.py; its answer, and what it printed to standard error as "stderr"."""

    def drive(what: str, *numbers: int, **changes: Any) -> dict[str, Any]:
        tiny_config(**changes).to_toml(tmp_path / "config.toml")
        program = Path(__file__).with_name("ranks_driver.py")
        arguments = [what, str(tmp_path / "config.toml"), str(tmp_path), *map(str, numbers)]
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}

    return drive


def test_kill_9_of_a_random_process(driver: Callable[..., dict[str, Any]]) -> None:
    """The long form is `make soak`."""
    report = driver("kill", 3, 1)
    assert report["wrong"] == [], report["stderr"][-3000:]
    assert sum(report["killed"].values()) >= 2


def test_a_hung_process_is_found(driver: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = driver("hang")
    assert report["codes"] == [1, 1]
    logs = tmp_path / "hung" / "logs"
    assert "stuck_here" in (logs / "rank1.stacks").read_text()
    first = (logs / "rank0.stacks").read_text()
    assert first.startswith("rank 0, process ")
    assert "no step for 2 s" in first
    assert "train_step" in first
    assert "senet: rank 1: no step for 2 s (--timeout); stacks in" in report["stderr"]


def test_sigterm_to_one_stops_all(driver: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = driver("term")
    assert report["codes"] == [[0, 0], [143, 143], [0, 0]]
    assert report["equal"]
    log = (tmp_path / "stopped" / "logs" / "rank1.log").read_text().splitlines()
    assert "rank 1 of 2 on cpu" in log[0]
    assert any("ends with Interrupted" in line for line in log)
    assert "epoch 2.000" not in log[-1]
    assert "top1" in log[-1]


def test_another_number_of_processes(driver: Callable[..., dict[str, Any]]) -> None:
    report = driver("resize")
    for before, after in ((2, 1), (1, 2)):
        found = report[f"{before} to {after}"]
        assert found["codes"] == [[143] * before, [0] * after]
        assert found["epochs"] == 2
        said = f"the run was made by {before} processes, now {after}: each step takes the same"
        assert any(note.startswith(said) for note in found["notes"]), found["notes"]


def test_gradients_of_batch_norm_over_all_processes(
    driver: Callable[..., dict[str, Any]],
) -> None:
    """float64: output, running statistics and every gradient are those of the whole batch."""
    report = driver("gradients")
    assert report["codes"] == [0, 0], report["stderr"]
    assert len(report["differences"]) == 4 + 16 + 12
    assert max(report["differences"].values()) < 1e-9, report["differences"]
    assert "separate passes" not in report["stderr"]  # the tail stays fused


def test_batch_norm_over_all_processes(
    driver: Callable[..., dict[str, Any]], tiny_config: Make, tmp_path: Path
) -> None:
    """Two processes with half of each batch learn what one with all of it learns."""
    plain = {"recipe_augmentation": Augmentation(crop="padded", padding=1), "recipe_epochs": 1}
    alone = train(tiny_config(out=tmp_path / "alone", **plain))
    report = driver("sync", **plain)
    assert report["codes"] == [0, 0]
    assert "separate passes" not in report["stderr"]
    one, two = (open_checkpoint(tmp_path / name).model.state_dict() for name in ("alone", "sync"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    both = (tmp_path / "sync" / "metrics.csv").read_text().splitlines()[1].split(",")
    assert float(both[3]) == pytest.approx(alone.history[0]["train_loss"], rel=1e-4)


def test_parts_of_a_step_add_up(tiny_config: Make, tmp_path: Path) -> None:
    """Without batch statistics, a step in four parts is the step as a whole."""
    gradients = []
    for parts in (1, 4):
        session = Session(tiny_config(accumulate=parts, recipe_grad_clip=None))
        for module in session.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        before = [p.detach().clone() for p in session.model.parameters()]
        images, targets = next(session.batches(0))
        session.train_step(images, targets, 1)
        after = session.model.parameters()
        gradients.append([p.detach() - b for p, b in zip(after, before, strict=True)])
    for whole, parted in zip(*gradients, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-3, atol=1e-8)


def test_parts_must_divide_the_images(tiny_config: Make) -> None:
    with pytest.raises(UserError, match="accumulate 3 must divide the 8 images a step of each"):
        Session(tiny_config(accumulate=3))
    with pytest.raises(UserError, match="accumulate must be a whole number of at least 1, got 0"):
        tiny_config(accumulate=0)
    with pytest.raises(UserError, match=r"timeout must be a number of seconds above 0, got -1"):
        tiny_config(timeout=-1)


HOLD = """
import sys
from pathlib import Path
from senet.training.ranks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_into_the_same_folder_is_refused(tiny_config: Make) -> None:
    run = train(tiny_config()).run
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    ) as other:
        assert other.stdout
        assert other.stdin
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on \S+: wait for"):
            resume(run)
        other.kill()  # the kernel gives the lock up
        other.wait()
        resume(run)
        with locked(run):
            pass


def test_clocks_may_jump(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes back an hour with each look; nothing that counts reads it."""
    expected = train(tiny_config()).history
    seconds = [2e9]

    def back() -> float:
        seconds[0] -= 3600
        return seconds[0]

    monkeypatch.setattr("time.time", back)
    run = train(tiny_config(out=tmp_path / "jumping", timeout=60.0))
    assert run.history == expected
    assert 0 < run.seconds < 60
    assert run.images_per_second > 0


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_the_command_under_torchrun(tiny_data: Path, tmp_path: Path) -> None:
    """One result, one run folder, a log of each process; --resume auto begins and goes on."""
    run = tmp_path / "run"
    flags = [
        "train", "--model", "se_resnet8_cifar", "--data", str(tiny_data), "--epochs", "2",
        "--batch-size", "8", "--scale-lr", "--accumulate", "2", "--device", "cpu",
        "--resume", "auto", "--out", str(run),
    ]  # fmt: skip
    done = subprocess.run(
        [*TORCHRUN, "-m", "senet", *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best top-1") == 1
    assert done.stdout.count("epoch 2/2") == 1
    assert {path.name for path in (run / "logs").iterdir()} == {"rank0.log", "rank1.log"}
    assert (run / "figures" / "gates_per_stage.png").exists()
    assert RunConfig.from_toml(run / "config.toml").recipe.lr == 0.2 * 8 / 128
    again = train_in_this_process(flags)
    assert again.returncode == 0, again.stderr
    assert "the run was made by 2 processes, now 1" in again.stderr + again.stdout


def train_in_this_process(flags: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "senet", *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
