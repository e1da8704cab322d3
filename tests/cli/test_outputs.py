"""What a command is to write at its end is refused before its work, if it cannot be written."""

from importlib import import_module
from pathlib import Path

import pytest
from cli_tools import run

import senet
from senet.checkpoint.write import write_checkpoint
from senet.data.image_data import preprocessing_for
from senet.models.description import describe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file and a folder in it, and no command that could work."""

    def works(*arguments: object, **options: object) -> None:
        raise AssertionError("it began to work")

    parts = (
        ("commands.evaluate", "evaluate_path"),
        ("commands.optimize", "optimize_network"),
        ("cli.export", "_opened"),
        ("commands.insert", "open_network"),
        ("commands.explain", "open_for_gates"),
        ("commands.fold", "open_for_gates"),
        ("training.data", "open_named"),
        ("bench.timing", "run_cases"),
    )
    # All are imported first: one that is imported later would keep what it finds in the others.
    modules = [import_module(f"senet.{module}") for module, _ in parts]
    for module, (_, name) in zip(modules, parts, strict=True):
        monkeypatch.setattr(module, name, works)
    (tmp_path / "file").write_text("former")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate run --csv missing/x.csv", "--csv missing/x.csv: there is no folder missing"),
        ("evaluate run --csv folder", "--csv folder: it is a folder"),
        ("evaluate run --figures file", "--figures file: {}/file is not a folder"),
        ("evaluate run --figures file/x", "--figures file/x: {}/file is not a folder"),
        ("insert --model resnet8_cifar --out file/x", "folder file/x: {}/file is not a folder"),
        ("explain run --out file/x", "cannot make folder file/x: {}/file is not a folder"),
        ("fold run --out file/x", "folder file/x: {}/file is not a folder"),
        ("fold run --out folder", "folder exists and is never overwritten"),
        ("bench ops --results missing/x.csv", "--results missing/x.csv: there is no folder"),
        ("bench ops --results file", "file has other columns"),
        ("export --model resnet8_cifar missing/x.onnx", "missing/x.onnx: there is no folder"),
        ("export --model resnet8_cifar --format timm missing/x.pth", "there is no folder missing"),
        ("export --model resnet8_cifar --format timm folder", "folder: it is a folder"),
        ("optimize resnet8_cifar --out missing/x.pt2", "--out missing/x.pt2: there is no folder"),
        ("shard data file/x", "OUT file/x: {}/file is not a folder"),
    ],
)
def test_refused_first(
    command: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *flags = command.split()
    run(capsys, name, *flags).refused(name, words.format(place))
    assert sorted(path.name for path in place.rglob("*")) == ["file", "folder"]
    assert (place / "file").read_text() == "former"


def test_confusions_of_labels_are_refused_before_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = senet.create_model("resnet8_cifar", num_classes=2)
    images = preprocessing_for(32, (0.5,) * 3, (0.5,) * 3).to_dict()
    task = {"name": "multilabel", "thresholds": [0.5, 0.5]}
    description = describe(model.config, images, ("a", "b"), task=task)
    write_checkpoint(tmp_path / "labels", model.state_dict(), description)
    monkeypatch.setattr("senet.commands.evaluate.open_data", None)
    found = run(capsys, "evaluate", tmp_path / "labels", "--figures", tmp_path / "f")
    found.refused("evaluate", "of classes, not of multilabel: leave out --figures")
    assert not (tmp_path / "f").exists()
