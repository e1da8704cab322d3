"""`--decode`, and streams of Hugging Face's library, in the commands that read images."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_tools import Outcome, make_data, run, train_flags
from PIL import Image
from safetensors.torch import load_file

from senet.data import decoders
from senet.training.config import RunConfig
from senet.training.state import load_training_state


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    data = make_data(tmp_path / "data")
    for path in list(data.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    return data


def test_turbo_from_training_to_prediction(
    jpegs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    real = decoders._torchvision
    monkeypatch.setattr(decoders, "_torchvision", lambda data: (asked.append(data), real(data))[1])
    flags = train_flags(jpegs, tmp_path / "run")
    assert run(capsys, *flags, "--decode", "turbo").code == 0
    assert RunConfig.from_toml(tmp_path / "run" / "config.toml").decode == "turbo"
    assert len(asked) >= 36

    other = run(capsys, "train", "--resume", tmp_path / "run", "--decode", "pillow")
    other.refused("train", "decode is 'turbo' there and 'pillow' here")
    asked.clear()
    judged = run(capsys, "evaluate", tmp_path / "run", "--json")  # as the run was trained
    assert judged.code == 0, judged.err
    assert len(asked) >= 36
    asked.clear()
    pillow = run(capsys, "evaluate", tmp_path / "run", "--decode", "pillow", "--json")
    assert not asked
    ours, theirs = json.loads(judged.out), json.loads(pillow.out)
    assert abs(ours["loss"] - theirs["loss"]) < 1e-2

    image = next(jpegs.rglob("*.jpg"))
    named = run(capsys, "predict", tmp_path / "run", image, "--decode", "turbo")
    assert named.code == 0, named.err
    assert len(asked) == 2  # the check, and the image


def test_wrong_decoders(jpegs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = train_flags(jpegs, tmp_path / "run")
    assert "turbo" in run(capsys, *flags, "--decode", "dali").err
    flags[flags.index("--data") + 1] = "embedded"
    run(capsys, *flags, "--decode", "turbo").refused("train", "embedded comes as pixels")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 training images in three Parquet files, 12 validation images."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    images = make_data(tmp_path / "images")
    names = ["blue", "green", "red"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split, ours, files in (("train", "train", 3), ("validation", "val", 1)):
        paths = sorted((images / ours).rglob("*.png"), key=lambda path: path.name)
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
            "label": [names.index(path.parent.name) for path in paths],
        }
        whole = datasets.Dataset.from_dict(rows, features=features)
        for index in range(files):
            part = whole.shard(files, index, contiguous=True)
            part.to_parquet(str(folder / f"{split}-{index:05d}-of-{files:05d}.parquet"))
    return folder


def stream_flags(parquet: Path, out: Path) -> list[object]:
    flags = train_flags(Path("unused"), out)
    flags[flags.index("--data") + 1] = f"hf-stream:{parquet}"
    return [*flags, "--epoch-size", 24, "--shuffle-buffer", 6]


@pytest.mark.filterwarnings("ignore")
def test_a_stream_is_trained_on_and_evaluated(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run(capsys, *stream_flags(parquet, tmp_path / "run"))
    assert trained.code == 0, trained.err
    config = RunConfig.from_toml(tmp_path / "run" / "config.toml")
    assert (config.epoch_size, config.shuffle_buffer) == (24, 6)
    judged = run(capsys, "evaluate", tmp_path / "run", "--json")  # needs no --epoch-size
    assert json.loads(judged.out)["n"] == 12
    no_size = stream_flags(parquet, tmp_path / "other")[:-4]
    run(capsys, *no_size).refused("train", "(num_examples): give --epoch-size N")
    changed = run(capsys, "train", "--resume", tmp_path / "run", "--shuffle-buffer", 7)
    changed.refused("train", "shuffle_buffer is 6 there and 7 here")

    def refused(command: str, *arguments: object) -> None:
        asked: Outcome = run(capsys, command, *arguments)
        asked.refused(command, f"senet {command} opens images in its own order", "use hf:NAME")

    refused("explain", tmp_path / "run", "--out", tmp_path / "explained")
    refused("shard", f"hf-stream:{parquet}", tmp_path / "shards")
    for option, value in (("--epoch-size", 5), ("--shuffle-buffer", 5)):
        flags = [*train_flags(tmp_path / "images", tmp_path / "x"), option, value]
        run(capsys, *flags).refused("train", "hf-stream:NAME")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
def test_a_stream_goes_on_exactly_after_a_kill(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """kill -9 within an epoch; the weights end up bit-identical to those of an undisturbed run."""

    def flags(out: str) -> list[object]:
        chosen = stream_flags(parquet, tmp_path / out)
        chosen[chosen.index("--epochs") + 1] = 4
        chosen[chosen.index("--batch-size") + 1] = 4
        return [*chosen, "--checkpoint-steps", 1, "--resume", "auto", "--workers", 1]

    command = [sys.executable, "-m", "senet", *map(str, flags("killed"))]
    killed = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        last = tmp_path / "killed" / "checkpoints" / "last"
        while not last.exists() and killed.poll() is None:
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    finally:
        killed.kill()
    state = load_training_state(tmp_path / "killed")
    assert state is not None
    assert 0 < state["position"]["step"] < 24
    for out in ("killed", "whole"):
        assert (done := run(capsys, *flags(out))).code == 0, done.err
    parts = [
        load_file(tmp_path / out / "checkpoints" / "last" / "model.safetensors")
        for out in ("whole", "killed")
    ]
    assert all(parts[0][name].equal(parts[1][name]) for name in parts[0])
    tables = [(tmp_path / out / "metrics.csv").read_text() for out in ("whole", "killed")]
    assert tables[0] == tables[1]
