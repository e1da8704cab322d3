"""`senet shard`, and the flags of `senet train` that clusters need."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import run, train_flags

from senet.training.config import RunConfig


def test_shards_are_made_and_trained_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["shard", data, tmp_path / "shards", "--shard-size", "20KB", "--workers", 2]
    made = run(capsys, *flags)
    assert made.code == 0, made.err
    assert "36 images in " in made.out
    assert f"senet train --data shards:{tmp_path / 'shards'}" in made.out
    again = run(capsys, *flags)
    assert "(0 written now)" in again.out
    assert "train-000000.tar: kept" in again.out
    trained = run(capsys, *train_flags(Path(f"shards:{tmp_path / 'shards'}"), tmp_path / "run"))
    assert trained.code == 0, trained.err
    judged = run(capsys, "evaluate", tmp_path / "run")
    assert judged.code == 0, judged.err


def test_shard_refuses(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(capsys, "shard", data, out, "--shard-size", "10X").refused("shard", "shard_size must be")
    run(capsys, "shard", "shards:x", out).refused("shard", "is shards already")
    run(capsys, "shard", data, data).refused("shard", "is not empty")
    run(capsys, "train", "--model", "resnet8_cifar", "--data", f"shards:{tmp_path}", "--out", out
    ).refused("train", "index.json: No such file")  # fmt: skip


def test_linear_scaling_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [flag for flag in train_flags(data, tmp_path / "run") if flag not in ("--lr", 0.05)]
    assert run(capsys, *plain, "--scale-lr").code == 0
    assert RunConfig.from_toml(tmp_path / "run" / "config.toml").recipe.lr == 0.2 * 8 / 128
    both = run(capsys, *train_flags(data, tmp_path / "other"), "--scale-lr")
    both.refused("train", "--scale-lr sets the learning rate: leave out --lr 0.05")
    no_batch = ["train", "--model", "resnet8_cifar", "--out", tmp_path / "x", "--scale-lr"]
    run(capsys, *no_batch).refused("train", "--scale-lr needs --batch-size")


def test_resume_auto_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    asked = run(capsys, "train", "--model", "resnet8_cifar", "--resume", "auto")
    asked.refused("train", "--resume auto needs --out")


def test_sigterm_has_its_exit_code(data: Path, tmp_path: Path) -> None:
    """As SLURM and Kubernetes send it; the same command goes on."""
    flags = [str(flag) for flag in train_flags(data, tmp_path / "run")]
    flags[flags.index("--epochs") + 1] = "300"
    command = [sys.executable, "-m", "senet", *flags, "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    process = start()
    try:
        assert process.stdout
        assert "epoch 1/300" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143
    assert f"senet train: stopped; to go on exactly here: senet train --resume {tmp_path}" in error
    rows = len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) - 1
    process = start()
    try:
        assert process.stdout
        assert f"epoch {rows + 1}/300" in process.stdout.readline()
    finally:
        process.kill()
        process.communicate()
