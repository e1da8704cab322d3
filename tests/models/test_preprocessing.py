"""`model.preprocessing` may be set as an object, as plain values, or not at all."""

from pathlib import Path

import pytest

import senet
from senet.checkpoint.files import open_checkpoint
from senet.data import Preprocessing
from senet.errors import UserError
from senet.models import Network


@pytest.mark.parametrize("plain", [False, True])
def test_it_is_saved(tmp_path: Path, plain: bool) -> None:
    wanted = Preprocessing(32, None, (0.5,) * 3, (0.25,) * 3, interpolation="bicubic")
    model = senet.create_model("se_resnet8_cifar", num_classes=3)
    model.preprocessing = wanted.to_dict() if plain else wanted
    assert model.preprocessing == wanted.to_dict()
    model.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).preprocessing == wanted
    assert Network.from_pretrained(tmp_path).preprocessing == wanted.to_dict()
    senet.save_weights(model, tmp_path / "x.safetensors")
    other = senet.create_model("se_resnet8_cifar", num_classes=3)
    senet.load_weights(other, tmp_path / "x.safetensors")
    assert other.preprocessing == wanted.to_dict()


def test_what_cannot_be_saved_is_refused_at_once() -> None:
    model = senet.create_model("se_resnet8_cifar", num_classes=3)
    for value in (3, {"mean": object()}, lambda image: image):
        with pytest.raises(UserError, match=r"preprocessing must be a senet\.data\.Preprocessing"):
            model.preprocessing = value
    assert model.preprocessing is None
    model.preprocessing = None
