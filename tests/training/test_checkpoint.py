"""Opening checkpoints, and everything that is not one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from senet.errors import SenetError, UserError
from senet.training.checkpoint import defect, open_checkpoint
from senet.training.config import RunConfig
from senet.training.loop import train

Make = Callable[..., RunConfig]


@pytest.fixture
def run(tiny_config: Make) -> Path:
    """A finished run."""
    config = tiny_config()
    train(config)
    return config.out


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("", "best"),
        ("checkpoints/last", "last"),
        ("checkpoints/previous", "previous"),
        ("checkpoints/last/model.safetensors", "last"),
    ],
)
def test_paths(run: Path, inner: str, expected: str) -> None:
    opened = open_checkpoint(run / inner)
    assert opened.path == run / "checkpoints" / expected / "model.safetensors"
    assert not opened.model.training
    assert opened.model.config["name"] == "se_resnet8_cifar"
    assert opened.model.config["options"] == {"reduction": 4}
    assert opened.config["recipe"]["name"] == "tiny"
    saved = load_file(opened.path)
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_weights_alone_are_enough(run: Path, tmp_path: Path) -> None:
    whole = run / "checkpoints" / "best" / "model.safetensors"
    copy = whole.rename(tmp_path / "anything.safetensors")
    assert open_checkpoint(copy).classes == ("ant", "bee", "cow")


def test_metadata_do_not_tell_the_place(run: Path) -> None:
    """Two runs of one configuration give equal files wherever they are."""
    path = run / "checkpoints" / "best" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["senet"])
    assert described["version"] == 1
    assert "out" not in described["run"]
    assert str(run) not in json.dumps(described)


def test_corrupt_best_is_passed_over(run: Path) -> None:
    flip_a_bit(run / "checkpoints" / "best" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"best is corrupt \(model.safetensors does not match"):
        assert open_checkpoint(run).path.parent.name == "last"


def test_corrupt_folder_is_an_error(run: Path) -> None:
    folder = run / "checkpoints" / "last"
    flip_a_bit(folder / "training_state.pt")
    with pytest.raises(SenetError, match=r"training_state\.pt does not match its SHA-256"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is unreadable"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is unreadable"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is unreadable"),
        (lambda f: (f / "training_state.pt").write_bytes(b"x"), "has 1 bytes instead of"),
    ],
)
def test_defects_are_named(run: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = run / "checkpoints" / "last"
    assert defect(folder) is None
    damage(folder)
    assert message in str(defect(folder))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="was not written by senet train"):
        open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="is not a safetensors file, or is cut short"):
        open_checkpoint(path)
    save_file({"weight": torch.zeros(2)}, path, {"senet": json.dumps({"version": 99})})
    with pytest.raises(UserError, match="has format version 99, this senet reads 1"):
        open_checkpoint(path)


def test_state_is_loaded_without_unpickling_objects(run: Path) -> None:
    state = torch.load(run / "checkpoints" / "last" / "training_state.pt", weights_only=True)
    assert state["position"]["epoch"] == 2
    assert {"model", "ema", "optimizer", "schedule", "scaler", "processes"} <= state.keys()
