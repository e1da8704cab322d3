"""What training images are like, and a training that uses it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import make_data, run
from PIL import Image

from senet.data import load_data
from senet.data.statistics import measure
from senet.training.config import RunConfig
from senet.training.loop import resume, train
from senet.training.session import Session

Make = Callable[..., RunConfig]


def pixels(folder: Path) -> np.ndarray:
    files = sorted((folder / "train").rglob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]) / 255


def test_mean_and_deviation_are_those_of_the_pixels(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    found = measure(load_data(str(data)))
    expected = pixels(data)
    assert found.mean == pytest.approx(expected.mean((0, 1, 2)))
    assert found.std == pytest.approx(expected.std((0, 1, 2)))
    assert (found.images, found.measured, found.counts) == (
        24, 24, {"blue": 8, "green": 8, "red": 8},
    )  # fmt: skip
    assert found.smallest == found.largest == (16, 16)
    few = measure(load_data(str(data)), limit=3)
    assert few.counts == {"blue": 1, "green": 1, "red": 1}  # spread over the data


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    found = run(capsys, "stats", data)
    assert found.code == 0, found.err
    assert "24 of 24 training images, 16×16 to 16×16 pixels" in found.out
    assert json.loads(run(capsys, "stats", data, "--json").out)["counts"]["red"] == 8
    grey = run(capsys, "stats", data, "--channels", 1, "--json").out
    assert len(json.loads(grey)["mean"]) == 1


def test_a_training_with_what_was_measured(tiny_config: Make, tiny_data: Path) -> None:
    config = tiny_config(recipe_normalisation="measured")
    session = Session(config)
    values = pixels(tiny_data)
    images = session.material.preprocessing
    assert images is not None
    assert images.mean == pytest.approx(values.mean((0, 1, 2)))
    assert images.std == pytest.approx(values.std((0, 1, 2)))
    result = train(config)
    assert resume(result.run).history == result.history


def test_in_the_units_of_the_network(tiny_config: Make, tiny_data: Path, tmp_path: Path) -> None:
    import senet
    from senet.checkpoint.write import write_checkpoint
    from senet.data import Preprocessing
    from senet.models.description import describe

    model = senet.create_model("se_resnet8_cifar", num_classes=3)
    caffe = Preprocessing(8, None, (100.0,) * 3, (1.0,) * 3, channel_order="bgr", value_range=255.0)
    description = describe(model.config, caffe.to_dict(), ("a", "b", "c"))
    write_checkpoint(tmp_path / "start", model.state_dict(), description)
    changes = {"init": str(tmp_path / "start"), "model_options": {}}
    images = Session(tiny_config(recipe_normalisation="measured", **changes)).material.preprocessing
    assert images is not None
    expected = torch.tensor(pixels(tiny_data)).mean((0, 1, 2)).flip(0) * 255
    assert images.mean == pytest.approx(expected.tolist())
    assert images.channel_order == "bgr"
