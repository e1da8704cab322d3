"""Foreign networks' images are prepared as timm and torchvision prepare them themselves."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision import models

from senet.checkpoint.files import open_checkpoint
from senet.commands.insert import insert_checkpoint
from senet.commands.network import open_network
from senet.data import Preprocessing
from senet.errors import UserError
from senet.networks.anywhere import open_source
from senet.networks.preparation import imagenet, of_timm, of_torchvision


@pytest.fixture
def picture() -> Image.Image:
    """Smooth, so that a pixel more or less of the resize does not matter, its colours do."""
    y, x = np.mgrid[0:410, 0:520] / 520
    pixels = np.stack([x, y, (x + y) / 2], axis=-1)
    return Image.fromarray((255 * pixels).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "side", "resize", "mean"),
    [
        ("resnet10t.c3_in1k", 176, 201, (0.485, 0.456, 0.406)),  # 176 / 0.875, rounded down
        ("mixer_s32_224", 224, 256, (0.5, 0.5, 0.5)),
        ("inception_v3.tf_in1k", 299, 341, (0.5, 0.5, 0.5)),
    ],
)
def test_timm(
    name: str, side: int, resize: int, mean: tuple[float, ...], picture: Image.Image
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    said = of_timm(model, 3)
    assert (said.image_size, said.resize, said.mean) == (side, resize, mean)
    theirs = create_transform(**resolve_model_data_config(model))(picture)
    torch.testing.assert_close(said.transform()(picture), theirs, atol=0.03, rtol=0)
    assert of_timm(model, 1).mean == pytest.approx((sum(mean) / 3,))


@pytest.mark.parametrize(
    ("name", "file", "weights"),
    [
        ("resnet50", None, models.ResNet50_Weights.IMAGENET1K_V1),
        ("resnet50", "resnet50-11ad3fa6.pth", models.ResNet50_Weights.IMAGENET1K_V2),
        ("resnet50", "mine.pth", models.ResNet50_Weights.IMAGENET1K_V1),
        ("efficientnet_b1", None, models.EfficientNet_B1_Weights.IMAGENET1K_V1),
        ("swin_t", None, models.Swin_T_Weights.IMAGENET1K_V1),
    ],
)
def test_torchvision(
    name: str, file: str | None, weights: models.WeightsEnum, picture: Image.Image
) -> None:
    said = of_torchvision(name, Path("folder") / file if file else None)
    theirs = weights.transforms()
    assert (said.image_size, said.resize) == (theirs.crop_size[0], theirs.resize_size[0])
    torch.testing.assert_close(said.transform()(picture), theirs(picture), atol=0.03, rtol=0)


def test_torchvision_inception_wants_what_its_own_transform_makes() -> None:
    """transform_input of inception_v3 with weights, which a network built without them lacks."""
    said = of_torchvision("inception_v3")
    assert (said.image_size, said.resize) == (299, 342)
    theirs = models.inception_v3(weights=None, init_weights=False, transform_input=True)
    grey = torch.full((1, 3, 4, 4), 0.25)
    preset = models.Inception_V3_Weights.IMAGENET1K_V1.transforms()
    normalized = (grey - torch.tensor(preset.mean)[:, None, None]) / torch.tensor(preset.std)[
        :, None, None
    ]
    ours = (grey - torch.tensor(said.mean)[:, None, None]) / torch.tensor(said.std)[:, None, None]
    torch.testing.assert_close(ours, theirs._transform_input(normalized))


def test_others_are_prepared_as_for_imagenet() -> None:
    assert of_torchvision("fcn_resnet50") == imagenet()
    assert (imagenet().image_size, imagenet().resize) == (224, 256)
    assert imagenet().mean == (0.485, 0.456, 0.406)


def test_insert_records_it(tmp_path: Path) -> None:
    insert_checkpoint(tmp_path / "a", model="timm:resnet10t", num_classes=2, options={})
    said = open_checkpoint(tmp_path / "a").preprocessing
    assert (said.image_size, said.resize, said.interpolation) == (176, 201, "bicubic")
    model = open_source("timm:resnet10t", num_classes=2)
    assert model.input_size == (3, 176, 176)
    assert isinstance(model.preprocessing, dict)
    assert Preprocessing.from_dict(model.preprocessing) == said
    insert_checkpoint(
        tmp_path / "b", model="timm:resnet10t", num_classes=2, image_size=88, options={}
    )
    said = open_checkpoint(tmp_path / "b").preprocessing
    assert (said.image_size, said.resize) == (88, 100)  # half of 176 and 201


NETWORK = """
from torch import nn
def net(num_classes=7):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))
def five():
    return net(5)
def told(num_classes):
    return net(num_classes)
"""


def test_a_file_says_how_many_classes_it_gives(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETWORK)
    for function, classes in (("net", 7), ("five", 5), ("told", 1000)):
        found = open_network(f"{tmp_path}/nets.py:{function}", None)
        assert found.classes == tuple(map(str, range(classes)))
    assert len(open_network(f"{tmp_path}/nets.py:net", None, num_classes=3).classes) == 3


@pytest.mark.parametrize("model", ["timm:test_resnet", "FILE"])
def test_weights_say_how_many_classes_they_have(model: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETWORK)
    name = model.replace("FILE", f"{tmp_path}/nets.py:net")
    trained = open_source(name, num_classes=4)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    assert open_network(name, tmp_path / "w.pth").classes == ("0", "1", "2", "3")
    with pytest.raises(UserError, match="as many classes"):
        open_network(name, tmp_path / "w.pth", num_classes=6)
