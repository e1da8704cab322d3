"""What a run and an evaluation show: report, figures of each class, CSV, JSON, trackers."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import run, train_flags

from senet.tasks.results import as_csv, class_results, worst


def test_report_of_a_run(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    for heading in ("Learning curves", "Confusions", "Gates", "Worst classes"):
        assert f"<h2>{heading}</h2>" in page
    for fact in ("se_resnet8_cifar", "24 + 12 images", "quick, 2 epochs, sgd, lr 0.05"):
        assert fact in page
    assert "<script" not in page
    assert "http" not in page.split("<body>")[0]


def test_most_confident_errors(trained: Path, data: Path, tmp_path: Path) -> None:
    from senet.checkpoint.files import open_checkpoint
    from senet.commands.report import confident_errors
    from senet.data import load_data
    from senet.reports.run import write_run_page
    from senet.training.config import RunConfig

    checkpoint, config = open_checkpoint(trained), RunConfig.from_toml(trained / "config.toml")
    bias = checkpoint.model.fc.bias
    bias.data[1] = 100.0  # green, whatever the image
    errors = confident_errors(checkpoint, load_data(str(data)), config)
    assert [each.truth for each in errors].count("green") == 0
    assert len(errors) == 8
    assert {each.taken_for for each in errors} == {"green"}
    assert all(each.probability > 0.99 for each in errors)
    folder = tmp_path
    confusion = np.array([[0, 4, 0], [0, 4, 0], [0, 4, 0]])
    page = write_run_page(
        folder, "<title>", [], class_results(confusion, checkpoint.classes), errors
    ).read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "&lt;title&gt;" in page
    assert "blue, taken for green" in page


CONFUSION = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 2]])


def test_figures_of_classes() -> None:
    cat, dog, eel = class_results(CONFUSION, ("cat", "dog", "eel"))
    assert (cat.images, cat.recall, cat.precision) == (4, 75.0, 60.0)
    assert cat.f1 == pytest.approx(2 * 75 * 60 / 135)
    assert (cat.taken_for, cat.mistakes) == ("dog", 1)
    assert np.isnan(dog.recall)
    assert (dog.precision, dog.f1, dog.taken_for) == (0.0, 0.0, "")
    assert [each.name for each in worst([cat, dog, eel], 2)] == ["cat", "eel"]
    rows = list(csv.reader(io.StringIO(as_csv([cat, dog]))))
    assert rows[0] == ["name", "images", "recall", "precision", "f1", "taken_for", "mistakes"]
    assert rows[2] == ["dog", "0", "", "0.0", "0.0", "", "0"]


def test_evaluate(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "classes.csv"
    found = run(capsys, "evaluate", trained, "--csv", file, "--no-tune-allocator")
    assert found.code == 0, found.err
    assert "recall (%)" in found.out
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["name"] for row in rows] == ["blue", "green", "red"]
    found = run(capsys, "evaluate", trained, "--json", "--no-tune-allocator")
    per_class = json.loads(found.out)["per_class"]
    assert [each["images"] for each in per_class] == [4, 4, 4]
    assert float(rows[0]["recall"]) == per_class[0]["recall"]


def test_predictions_as_csv(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = data / "val" / "red" / "0.png"
    found = run(capsys, "predict", trained, image, "--csv", "--top", 2, "--no-tune-allocator")
    assert found.code == 0, found.err
    first, second = csv.DictReader(io.StringIO(found.out))
    assert (first["image"], first["rank"], second["rank"]) == (str(image), "1", "2")
    assert float(first["probability"]) >= float(second["probability"])
    run(capsys, "predict", trained, image, "--csv", "--json").refused("predict", "not both")


def test_networks_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "models", "se_resnet20*", "--json").out)
    (network,) = found
    assert network["name"] == "se_resnet20_cifar"
    stages = json.loads(run(capsys, "summary", "se_resnet20_cifar", "--json").out)
    assert stages["parameters"] == sum(stage["parameters"] for stage in stages["stages"])
    run(capsys, "summary", "block", "--channels", 8, "--json").refused("summary", "--json")


def test_completion_knows_the_commands() -> None:
    from senet.cli import app

    script = app.generate_completion(prog_name="senet", shell="bash")
    for word in ("recipes", "--label-smoothing", "--crop-scale"):
        assert word in script


class Fake:
    """In the place of accelerate's tracker of wandb."""

    heard: list[tuple[str, Any]]

    def __init__(self, project: str, **options: Any) -> None:
        Fake.heard = [("new", (project, options))]

    def start(self) -> None:
        self.heard.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.heard.append(("configuration", values))

    def log(self, values: dict[str, float], step: int) -> None:
        self.heard.append(("log", (step, values)))

    def finish(self) -> None:
        self.heard.append(("finish", None))


def test_trackers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from senet.training import tracking

    out = tmp_path / "run"
    flags = [*train_flags(data, out), "--track", "wandb"]
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    run(capsys, *flags).refused("train", "pip install wandb")
    assert not out.exists()
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    found = run(capsys, *flags)
    assert found.code == 0, found.err
    kinds = [kind for kind, _ in Fake.heard]
    assert kinds == ["new", "start", "configuration", *["log"] * 8, "finish"]
    assert Fake.heard[0][1] == ("senet", {"name": "run"})
    assert Fake.heard[2][1]["recipe.epochs"] == 2
    steps = [step for kind, (step, _) in Fake.heard[3:-1]]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]
    assert "epoch/top1" in Fake.heard[6][1][1]
