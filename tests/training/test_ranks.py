"""Two processes that train together: killed, hung, stopped, resized, locked out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from senet.checkpoint.files import open_checkpoint
from senet.data import Augmentation
from senet.errors import SenetError, UserError
from senet.insertion.insert import insert
from senet.models import build_model
from senet.training.config import RunConfig
from senet.training.fsdp import forward_of, shard
from senet.training.loop import resume, train
from senet.training.ranks import locked
from senet.training.session import Session

Make = Callable[..., RunConfig]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def driver(tiny_config: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs ranks_driver.py; its answer, and what it printed to standard error as "stderr"."""

    def drive(what: str, *more: object, **changes: Any) -> dict[str, Any]:
        tiny_config(**changes).to_toml(tmp_path / "config.toml")
        program = Path(__file__).with_name("ranks_driver.py")
        arguments = [what, str(tmp_path / "config.toml"), str(tmp_path), *map(str, more)]
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


def test_fsdp_learns_what_ddp_learns(
    driver: Callable[..., dict[str, Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """Each process holds half; a run goes on exactly, and from FSDP to DDP, one process and back.

    Of nine validation images one process has two batches, the other one.
    """
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for image in sorted((data / "val").glob("*/*.png"))[::4]:
        image.unlink()
    report = driver("shard", data=str(data), accumulate=2)
    assert report["codes"] == [[0, 0], [0, 0], *[[143, 143]] * 2, *[[0, 0]] * 3, [0]]
    for kind, whole in report["held"]["ddp"][0].items():
        both = [held[kind] for held in report["held"]["fsdp"]]
        assert sum(both) == whole, kind
        assert max(both) < 0.53 * whole, kind  # the classifier has three rows
    assert report["equal"]
    assert report["fsdp-fsdp"] == report["ddp-fsdp"][:1]  # that there are few classes
    assert "the run began with parallel fsdp, now ddp" in report["fsdp-ddp"][-1]
    for name in ("fsdp", "fsdp-fsdp", "fsdp-ddp", "ddp-fsdp"):
        assert report["differences"][name] < 1e-4, (name, report["differences"])
    rows = [(tmp_path / kind / "metrics.csv").read_text() for kind in ("ddp", "fsdp")]
    first, second = ([float(x) for x in text.split("\n")[2].split(",")] for text in rows)
    assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.soak
def test_fsdp_with_other_options(
    driver: Callable[..., dict[str, Any]], tiny_config: Make, tmp_path: Path
) -> None:
    """bf16, batch norm over all processes, frozen layers: as under DDP."""
    start = train(tiny_config(out=tmp_path / "start", recipe_epochs=1)).run
    report = driver("options", start, recipe_epochs=1)
    assert report["codes"] == [[0, 0]] * 6, report["stderr"]
    assert "separate passes" not in report["stderr"]
    assert report["differences"]["sync"] < 1e-4
    assert report["differences"]["tuned"] < 1e-4
    # A gradient whose last bit differs may round to another bf16 in the next step.
    assert report["differences"]["bf16"] < 2e-2
    before, after = (
        open_checkpoint(tmp_path / name).model.state_dict() for name in ("start", "tuned-fsdp")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".se." in name or name.startswith("fc.") for name in moved), moved


def inserted_vgg() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.vgg11_bn(num_classes=4, dropout=0.0)
    model.classifier = torch.nn.Linear(512 * 49, 4)  # 100 million parameters fewer
    insert(model, example_input=torch.zeros(1, 3, 32, 32))
    return model


class InPlace(torch.nn.Module):
    """A block whose shortcut counts on it that ReLU has changed x."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = torch.nn.ReLU(inplace=True), torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.relu(x)) + x


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_fsdp_with_a_block_that_changes_its_input() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), InPlace())
    shard(model, torch.device("cpu"), 1)
    with (
        pytest.raises(SenetError, match=r"changes its input in place .* give --parallel ddp"),
        forward_of(model),
    ):
        model(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    "make",
    [
        partial(build_model, "se_resnet164_cifar", num_classes=4),
        partial(build_model, "se_mobilenet", num_classes=4),
        partial(build_model, "se_shufflenet_g3", num_classes=4),
        inserted_vgg,
    ],
    ids=["se_resnet164_cifar", "se_mobilenet", "se_shufflenet_g3", "inserted"],
)
@pytest.mark.usefixtures("alone")
def test_fsdp_gathers_what_a_network_reads(make: Callable[[], torch.nn.Module]) -> None:
    """Parameters that a block reads outside its own forward would be refused by PyTorch."""
    plain, spread = make(), make()
    spread.load_state_dict(plain.state_dict())
    shard(spread, torch.device("cpu"), 1)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    for model in (plain, spread):
        torch.manual_seed(0)
        model(x).square().sum().backward()
    for one, two in zip(plain.parameters(), spread.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(two.grad.full_tensor(), one.grad)  # type: ignore[union-attr]


def test_fsdp_where_it_makes_no_sense(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="parallel must be one of ddp, fsdp, got 'both'"):
        tiny_config(parallel="both")
    with pytest.raises(UserError, match="parallel 'fsdp' and compile do not go together"):
        tiny_config(parallel="fsdp", compile=True)
    with pytest.raises(UserError, match="and this is one: begin with torchrun"):
        Session(tiny_config(parallel="fsdp"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"USE_FSDP is .true.*give senet --parallel fsdp"):
        Session(tiny_config())


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
    other = train_in_this_process([*flags, "--recipe", "finetune"])
    assert other.returncode == 2
    assert "lr is 0.0125 there and" in other.stderr, other.stderr


@pytest.mark.soak
def test_torchrun_starts_killed_processes_anew(tiny_config: Make, tmp_path: Path) -> None:
    """`--max-restarts`, with the setting of docs/cluster.md: SIGKILL to one of two processes."""
    run = tmp_path / "run"
    tiny_config(recipe_epochs=15).to_toml(tmp_path / "config.toml")
    flags = ["--config", str(tmp_path / "config.toml"), "--resume", "auto", "--out", str(run)]
    with subprocess.Popen(
        [*TORCHRUN, "--max-restarts=1", "-m", "senet", "train", *flags],
        env=ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launched:
        log = run / "logs" / "rank1.log"
        while not (run / "checkpoints/last/manifest.json").exists():
            assert launched.poll() is None
            time.sleep(0.02)
        _, _, victim, *_ = log.read_text().split()
        os.kill(int(victim), signal.SIGKILL)
        out, errors = launched.communicate(timeout=60)
    assert launched.returncode == 0, errors[-3000:]
    assert out.count("best top-1") == 1
    begun = [line.split() for line in log.read_text().splitlines() if "rank 1 of 2" in line]
    assert len(begun) == 2
    assert begun[1][2] != victim
    assert len((run / "metrics.csv").read_text().splitlines()) == 16


def train_in_this_process(flags: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "senet", *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
