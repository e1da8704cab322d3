"""`--decode` in the commands that read images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cli_tools import make_data, run, train_flags
from senet.data import decoders
from senet.training.config import RunConfig


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
