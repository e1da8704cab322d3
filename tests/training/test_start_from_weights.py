"""`train` from a file of weights that does not say which network it is for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import senet
from senet.errors import UserError
from senet.training.config import RunConfig
from senet.training.finetuning import starting_checkpoint
from senet.training.loop import train

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_registered_network(tiny_config: Make, tmp_path: Path, suffix: str) -> None:
    source = senet.create_model("se_resnet8_cifar", num_classes=5)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict()}, file)
    else:
        save_file(source.state_dict(), file)
    config = tiny_config(model="se_resnet8_cifar", model_options={}, init=file, train="head")
    start = starting_checkpoint(config)
    assert start.preprocessing is None  # nothing in the file tells
    assert torch.equal(start.model.conv1.weight, source.conv1.weight)
    result = train(config)
    trained = senet.checkpoint.files.open_checkpoint(result.run).model
    assert torch.equal(trained.conv1.weight, source.conv1.weight)  # the head alone was trained
    assert trained.fc.weight.shape[0] == 3


def test_options_of_the_network_and_weights_without_a_head(
    tiny_config: Make, tmp_path: Path
) -> None:
    source = senet.create_model("se_resnet8_cifar", num_classes=5, gate="tanh", reduction=4)
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    torch.save(state, tmp_path / "x.pth")
    options = {"gate": "tanh", "reduction": 4}
    config = tiny_config(model="se_resnet8_cifar", model_options=options, init=tmp_path / "x.pth")
    start = starting_checkpoint(config)
    assert start.model.config["options"] == options
    assert torch.equal(start.model.conv1.weight, source.conv1.weight)
    with pytest.raises(UserError, match="weights do not fit the model"):
        starting_checkpoint(tiny_config(model="se_resnet20_cifar", init=tmp_path / "x.pth"))


def test_the_layout_tells_the_preprocessing(tiny_config: Make, tmp_path: Path) -> None:
    senet.save_weights(senet.create_model("resnet18"), tmp_path / "x.pth", layout="torchvision")
    start = starting_checkpoint(
        tiny_config(model="resnet18", model_options={}, init=tmp_path / "x.pth")
    )
    assert start.preprocessing is not None
    assert start.preprocessing.mean == (0.485, 0.456, 0.406)
