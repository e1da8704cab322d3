"""Opening checkpoints, and everything that is not one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from senet import create_model, save_weights
from senet.checkpoint.files import open_checkpoint, open_weights
from senet.checkpoint.write import defect
from senet.data import Preprocessing
from senet.errors import SenetError, UserError
from senet.models import Network
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


def test_a_run_can_be_published(run: Path, tmp_path: Path) -> None:
    """save_pretrained writes the run's numbers, and its folder opens like a checkpoint."""
    opened = open_checkpoint(run)
    assert opened.model.metrics == opened.metrics
    opened.model.save_pretrained(tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    assert f"| top1 | {opened.metrics['top1']:g} |" in card
    assert "Classes: ant, bee, cow" in card
    again = open_checkpoint(tmp_path / "published")
    for name in ("classes", "preprocessing", "metrics"):
        assert getattr(again, name) == getattr(opened, name)
    assert again.config == {}
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.model(x), opened.model(x))


def test_checkpoints_and_published_networks_have_one_schema(run: Path, tmp_path: Path) -> None:
    open_checkpoint(run).model.save_pretrained(tmp_path)
    found = []
    for folder in (run / "checkpoints" / "best", tmp_path):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert file.metadata().keys() == {"senet"}
            found.append(json.loads(file.metadata()["senet"]))
    trained, published = found
    assert trained.pop("step") == published["metrics"]["step"]
    assert trained.pop("run")["recipe"]["name"] == "tiny"
    assert published.pop("run") == {}  # no paths of the user's machine
    assert trained == published
    model = Network.from_pretrained(run / "checkpoints" / "best")
    assert (model.classes, model.metrics) == (("ant", "bee", "cow"), trained["metrics"])


def test_networks_on_the_hub(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "checkpoints" / "best" / "model.safetensors"
    asked = []

    def download(*arguments: str) -> str:
        asked.append(arguments)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for source in ("hf_hub:owner/name", Path("hf_hub:owner/name")):
        assert open_checkpoint(source).classes == ("ant", "bee", "cow")
    assert asked == [("owner/name", "model.safetensors")] * 2


def test_a_network_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    model = create_model("resnet8_cifar", num_classes=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"how an image becomes the network's input.*save_pre"):
        open_checkpoint(tmp_path)
    headless = create_model("resnet8_cifar", num_classes=0)
    headless.preprocessing = Preprocessing(32, None, (0.5,) * 3, (0.5,) * 3).to_dict()
    headless.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a network without classes"):
        open_checkpoint(tmp_path)


def test_weights_of_others_tell_classes_channels_and_preprocessing(tmp_path: Path) -> None:
    peer = timm.create_model("seresnet18", num_classes=7, in_chans=1).eval()
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "timm.pth")
    opened = open_weights("se_resnet18", tmp_path / "timm.pth")
    assert opened.model.config["in_channels"] == 1
    assert opened.model.config["options"] == {"divisor": 8}
    assert opened.classes == tuple("0123456")
    assert opened.model.classes is None
    assert (opened.preprocessing.channels, opened.preprocessing.interpolation) == (1, "bicubic")
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(opened.model(x), peer(x), rtol=1e-5, atol=1e-5)


def test_caffe_weights_want_blue_first(tmp_path: Path) -> None:
    save_weights(create_model("bn_inception", num_classes=5), tmp_path / "c.pth", "bninception")
    opened = open_weights("bn_inception", tmp_path / "c.pth")
    assert (opened.preprocessing.channel_order, opened.preprocessing.value_range) == ("bgr", 255.0)
    assert opened.preprocessing.mean == (104.0, 117.0, 128.0)


def test_weights_that_do_not_go_with_the_name(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"says itself which network.*leave out --model resnet50"):
        open_weights("resnet50", run / "checkpoints" / "best" / "model.safetensors")
    torch.save(create_model("resnet8_cifar").state_dict(), tmp_path / "own.pth")
    with pytest.raises(UserError, match="how an image becomes the network's input"):
        open_weights("resnet8_cifar", tmp_path / "own.pth")
    with pytest.raises(UserError, match="weights do not fit the model"):
        open_weights("resnet18", tmp_path / "own.pth")
    with pytest.raises(UserError, match="unknown model 'resnet8'"):
        open_weights("resnet8", tmp_path / "own.pth")
    with pytest.raises(UserError, match="no such file"):
        open_weights("resnet18", tmp_path / "none.pth")


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
    with pytest.raises(UserError, match=r"was not written by senet .*--model NAME"):
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
