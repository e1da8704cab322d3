"""save_pretrained and from_pretrained on a local folder, and the model card."""

import json

import pytest
import torch

import senet
from senet.errors import UserError
from senet.models import Network
from senet.models.mobilenet import MobileNet
from senet.models.resnet import ResNet


@pytest.fixture
def model():
    model = senet.create_model("se_resnet8_cifar", num_classes=3, reduction=8, stages=(2, 4))
    model.classes = ("cat", "dog", "owl")
    model.metrics = {"epoch": 7, "top1": 91.25}
    model.preprocessing = {"image_size": 32, "mean": [0.5], "channels": 3}
    return model.eval()


@pytest.mark.parametrize("cls", [Network, ResNet])
def test_round_trip(model, cls, tmp_path):
    model.save_pretrained(tmp_path / "net")
    again = cls.from_pretrained(tmp_path / "net")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert not again.training
    for attribute in ("config", "classes", "metrics", "preprocessing"):
        assert getattr(again, attribute) == getattr(model, attribute)


def test_folder_is_readable_by_others(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["name"] == "se_resnet8_cifar"
    assert config["classes"] == ["cat", "dog", "owl"]
    report = senet.load_weights(
        senet.create_model("se_resnet8_cifar", num_classes=3, reduction=8, stages=(2, 4)),
        tmp_path / "model.safetensors",
    )
    assert report.layout == "senet"


def test_model_card_has_the_numbers_of_the_run(model, tmp_path):
    card = {"repository": "owner/name", "text": "Trained on cats."}
    model.save_pretrained(tmp_path, model_card_kwargs=card)
    text = (tmp_path / "README.md").read_text()
    for expected in (
        "# se_resnet8_cifar",
        "| top1 | 91.25 |",
        "reduction = 8",
        "Classes: cat, dog, owl",
        "Trained on cats.",
        'Network.from_pretrained("owner/name")',
        "library_name: senet",
    ):
        assert expected in text
    with pytest.raises(TypeError, match="repository and text, got"):
        model.generate_model_card(author="me")


def test_push_uploads_the_same_folder(model, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **_):
            uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert model.push_to_hub("owner/name") == "commit"
    assert uploaded == {"owner/name": ["README.md", "config.json", "model.safetensors"]}


def test_errors(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="se_resnet8_cifar is a ResNet, not a MobileNet"):
        MobileNet.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        Network.from_pretrained(tmp_path)
