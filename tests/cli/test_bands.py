"""Images of four bands of 16 bits from training to the gates, by the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_tools import run, train_flags


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    for split, each in (("train", 8), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = rng.integers(0, 20_000, (16, 16, 4)) + 30_000 * label
                np.save(folder / split / name / f"{number}.npy", pixels.astype(np.uint16))
    return folder


def test_resumed_inserted_explained(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def done(*arguments: object) -> str:
        outcome = run(capsys, *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    flags = train_flags(bands, tmp_path / "plain")
    del flags[flags.index("--reduction") : flags.index("--reduction") + 2]
    flags[flags.index("--model") + 1] = "resnet8_cifar"
    flags[flags.index("--epochs") + 1] = 1
    done(*flags)
    done("train", "--resume", tmp_path / "plain", "--data", bands)
    assert "bit-identical" in done("insert", tmp_path / "plain", "--out", tmp_path / "inserted")
    tuned = tmp_path / "tuned"
    steps = ("--epochs", 1, "--batch-size", 8, "--device", "cpu")
    init = ("--init", tmp_path / "inserted", "--train", "se")
    done("train", *init, "--data", bands, *steps, "--out", tuned)
    assert json.loads(done("evaluate", tuned, "--json"))["n"] == 8
    done("explain", tuned, "--out", tmp_path / "gates", "--images", 4)
    assert "data:image/" in (tmp_path / "gates" / "report.html").read_text()
    image = next((bands / "val" / "light").iterdir())
    answers = json.loads(done("predict", tuned, image, "--json"))
    assert len(answers[0]["predictions"]) == 2
