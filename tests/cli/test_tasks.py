"""Several labels and numbers through the commands: train, evaluate, predict, export, explain."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from cli_tools import make_images, run, train_flags

from senet import create_model
from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.commands.evaluate import open_data
from senet.data import Preprocessing, load_data
from senet.errors import SenetError, UserError
from senet.training import RunConfig, fit, get_recipe, resume
from senet.training.session import Session
from senet.training.task import fitting, task_of

NAMES = ("blue", "even")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images, the labels blue and even, and two numbers, by splits."""
    folder = make_images(tmp_path_factory.mktemp("tasks"))
    rows = []
    for number, path in enumerate(sorted(folder.glob("*/*.png"))):
        labels = [path.parent.name == "blue", number % 2 == 0]
        split = "val" if number % 3 == 2 else "train"
        name = str(path.relative_to(folder))
        tags = ";".join(n for n, has in zip(NAMES, labels, strict=True) if has)
        rows.append((name, tags, *map(int, labels), 100 + 20 * number, number / 4, split))
    with (folder / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "label", *NAMES, "size", "weight", "split"), *rows],
        )
    return folder


def trained(tables: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    found = run(capsys, *train_flags(tables / "all.csv", out), *flags)
    assert found.code == 0, found.err
    return found.err


def test_labels(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    told = trained(tables, out, capsys, "--label-smoothing", 0.1, "--mixup", 0.2,
                   "--class-weights", "balanced")  # fmt: skip
    assert "task multilabel: labels in the column 'label' are separated by ';'" in told
    rows = list(csv.DictReader(io.StringIO((out / "metrics.csv").read_text())))
    assert list(rows[0]) == [
        "epoch", "step", "lr", "train_loss", "val_loss", "mean_ap", "macro_f1",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    for words in ("Worst labels", "best epoch", "mAP", "Most confident errors", "Gates"):
        assert words in page
    task = open_checkpoint(out).task
    assert task.names == NAMES
    best = max(rows, key=lambda row: float(row["mean_ap"]))
    found = run(capsys, "evaluate", out, "--json", "--device", "cpu")
    values = json.loads(found.out)
    assert values["task"] == "multilabel"
    for name in ("mean_ap", "macro_f1"):
        assert values[name] == pytest.approx(float(best[name]), abs=1e-4)
    limits = [each["threshold"] for each in values["per_label"]]
    assert task.to_dict() == {"name": "multilabel", "thresholds": limits}
    # The same labels as columns; the checkpoint's names find them.
    other = run(capsys, "evaluate", out, "--json", "--data", tables / "all.csv",
                "--label-column", "blue,even", "--split", "train")  # fmt: skip
    assert json.loads(other.out)["n"] == 16
    image = next(tables.glob("blue/*.png"))
    rows = list(csv.DictReader(io.StringIO(run(capsys, "predict", out, image, "--csv").out)))
    assert {row["label"] for row in rows} == set(NAMES)
    for row in rows:
        reached = float(row["probability"]) >= float(row["threshold"])
        assert row["present"] == str(reached)
    run(capsys, "predict", out, image, "--top", 2).refused("predict", "--top is for classes")
    run(capsys, "fold", out, "--out", tmp_path / "f").refused("fold", "judges by top-1 of classes")
    run(capsys, "evaluate", out, "--figures", tmp_path / "f").refused("evaluate", "of classes")
    # Data of another task are refused.
    mixed = run(capsys, "evaluate", out, "--data", tables, "--json")
    mixed.refused("evaluate", "has one class an image")
    inserted = run(capsys, "insert", "--weights", out, "--out", tmp_path / "more")
    inserted.refused("insert", "SE")
    compared = run(capsys, "compare", "--data", tables / "all.csv", "--out", tmp_path / "c")
    compared.refused("compare", "compares top-1 of classes")


def test_numbers(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ("--label-column", "size,weight", "--loss", "l1")
    told = trained(tables, out, capsys, *flags)
    assert "task regression: the columns size, weight hold numbers" in told
    assert "gradients clipped to 1, for numbers" in told
    assert "Largest errors" in (out / "report.html").read_text()
    assert (out / "figures" / "predictions.svg").is_file()
    found = json.loads(run(capsys, "evaluate", out, "--json", "--device", "cpu").out)
    assert [each["name"] for each in found["per_number"]] == ["size", "weight"]
    task = open_checkpoint(out).task.to_dict()
    assert task is not None
    assert task["error"] == "l1"
    train = load_data(str(tables / "all.csv"), label_column="size,weight").train.targets  # type: ignore[union-attr]
    assert task["mean"] == pytest.approx(train.mean(0).tolist())
    image = next(tables.glob("blue/*.png"))
    numbers = json.loads(run(capsys, "predict", out, image, "--json").out)[0]["predictions"]
    assert [each["number"] for each in numbers] == ["size", "weight"]
    run(capsys, "export", out, tmp_path / "n.pt2", "--form", "plain")
    other = json.loads(run(capsys, "predict", tmp_path / "n.pt2", image, "--json").out)
    for a, b in zip(numbers, other[0]["predictions"], strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-3)  # in their own units, without task
    smooth = run(capsys, *train_flags(tables / "all.csv", tmp_path / "x"), *flags,
                 "--label-smoothing", 0.2)  # fmt: skip
    smooth.refused("train", "label_smoothing 0.2 is for classes, not for regression")
    wrong = run(capsys, *train_flags(tables / "all.csv", tmp_path / "x"), "--loss", "mse")
    wrong.refused("train", "loss 'mse' is not for multilabel")
    # Going on from it: its scale holds; with other outputs the head is new.
    config = RunConfig.from_toml(out / "config.toml", out=tmp_path / "y", init=str(out),
                                 model_options={})  # fmt: skip
    session = Session(config)
    assert session.task.to_dict() == task
    assert not session.material.new
    labels = RunConfig.from_toml(out / "config.toml", out=tmp_path / "z", init=str(out),
                                 label_column="blue,even", model_options={},
                                 recipe=get_recipe("finetune", batch_size=8))  # fmt: skip
    assert Session(labels).material.new == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_data_of_the_training_are_read_for_its_task(task: str, tmp_path: Path) -> None:
    """Labels that look like several an image may have been trained as one, and the other way."""
    folder = make_images(tmp_path / "images", classes=("x",), each=8)
    table, labels = folder / "tags.csv", ("a", "b", "a;b", "b") if task[0] == "c" else ("a", "b")
    rows = "".join(f"x/{i}.png,{labels[i % len(labels)]}\n" for i in range(8))
    table.write_text(f"file,label\n{rows}")
    own = {"data": str(table), "task": task, "val_fraction": 0.5}
    names = tuple(sorted(set(labels))) if task == "classification" else ("a", "b")
    model = create_model("se_resnet8_cifar", num_classes=len(names))
    model.classes = names
    model.task = None if task == "classification" else {"name": task, "thresholds": None}
    images = Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3)
    data = open_data(Checkpoint(model, names, images, {}, own, tmp_path), None, {})
    assert (data.task, data.classes) == (task, names)


def test_what_a_recipe_has_no_use_for_is_left_out_and_told() -> None:
    recipe, notes = fitting(get_recipe("finetune"), "regression")
    assert recipe.label_smoothing == 0
    assert notes == ["label_smoothing 0.1 of the recipe finetune is left out: not for regression"]
    assert fitting(get_recipe("finetune"), "multilabel") == (get_recipe("finetune"), [])


def test_balanced_weights_of_labels(tables: Path) -> None:
    data = load_data(str(tables / "all.csv"))
    task = task_of(get_recipe("quick", class_weights="balanced"), data)
    having = data.train.targets.sum(0)  # type: ignore[union-attr]
    weights = torch.tensor(task.weights)  # type: ignore[union-attr]
    torch.testing.assert_close(weights, (16 - having) / having)


def test_resumed_bit_by_bit(tables: Path, tmp_path: Path) -> None:
    """A run that was stopped in the middle of its second epoch, and one that was not."""
    recipe = get_recipe("quick", epochs=2, batch_size=4, lr=0.05, mixup=0.2, grad_clip=1.0)
    options = {"model": "se_resnet8_cifar", "data": str(tables / "all.csv"), "recipe": recipe}
    options |= {"device": "cpu", "checkpoint_steps": 1}
    weights = []
    from senet.support.progress import Progress
    from senet.training import train

    class Stopper(Progress):
        steps = 0

        def step(self, images: int, loss: float, lr: float) -> None:
            self.steps += 1
            if self.steps == 7:  # with 6 done
                raise SenetError("stopped")

    train(RunConfig(out=tmp_path / "a", **options))
    with pytest.raises(SenetError, match="stopped"):
        train(RunConfig(out=tmp_path / "b", **options), progress=Stopper())
    resume(tmp_path / "b")
    for name in ("a", "b"):
        weights.append((tmp_path / name / "checkpoints/last/model.safetensors").read_bytes())
    assert (tmp_path / "a/metrics.csv").read_text() == (tmp_path / "b/metrics.csv").read_text()
    opened = [open_checkpoint(tmp_path / name / "checkpoints/last") for name in ("a", "b")]
    assert opened[0].task == opened[1].task
    for key, value in opened[0].model.state_dict().items():
        assert torch.equal(value, opened[1].model.state_dict()[key])


def test_fit_knows_the_task_of_the_data(tables: Path, tmp_path: Path) -> None:
    data = load_data(str(tables / "all.csv"), label_column="size,weight")
    model = create_model("se_resnet8_cifar", num_classes=2)
    recipe = get_recipe("finetune", epochs=1, warmup_epochs=0, batch_size=8)
    result = fit(model, data, recipe=recipe, out=tmp_path / "run", device="cpu")
    assert result.judged == "r2"
    again = fit(model, data, recipe=recipe, out=tmp_path / "run", device="cpu", resume=True)
    assert again.history == result.history


@pytest.mark.filterwarnings("ignore:class .* has no images")
@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        (("1", "2", "3"), ("--task", "regression"), "give at least 2 for validation"),
        (("a", "b", "", ""), ("--task", "multilabel"), "no validation image has a label"),
    ],
)
def test_images_that_cannot_judge_are_told_before_the_training(
    rows: tuple[str, ...],
    flags: tuple[str, ...],
    words: str,
    tables: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = sorted(tables.glob("*/*.png"))[: len(rows)]
    table = tmp_path / "few.csv"
    with table.open("w", newline="") as file:
        splits = ("train", "train", "val", "val")
        lines = zip(images, rows, splits, strict=False)
        csv.writer(file).writerows([("file", "label", "split"), *lines])
    out = tmp_path / "run"
    found = run(capsys, *train_flags(table, out), *flags)
    assert (found.code, words in found.err.splitlines()[-1]) == (2, True), found.err
    assert not out.exists()
    data = load_data(str(table), task=flags[1])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        fit(torch.nn.Flatten(), data, recipe=get_recipe("quick", batch_size=1), out=out)
    assert not out.exists()
