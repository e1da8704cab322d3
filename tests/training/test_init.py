"""`init`: images are prepared as the checkpoint's network knows them; explicit options win."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import senet
from senet.checkpoint.files import open_checkpoint
from senet.checkpoint.write import write_checkpoint
from senet.commands.evaluate import evaluate_checkpoint, open_data
from senet.data import Preprocessing
from senet.models.description import describe
from senet.training.config import RunConfig
from senet.training.loop import train
from senet.training.session import Session

Make = Callable[..., RunConfig]
THEIRS = Preprocessing(
    image_size=20,
    resize=24,
    mean=(110.0, 120.0, 130.0),
    std=(50.0, 60.0, 70.0),
    interpolation="bicubic",
    channel_order="bgr",
    value_range=255.0,
)


@pytest.fixture
def start(tmp_path: Path) -> str:
    model = senet.create_model("se_resnet8_cifar", num_classes=3)
    description = describe(model.config, THEIRS.to_dict(), ("a", "b", "c"))
    write_checkpoint(tmp_path / "start", model.state_dict(), description)
    return str(tmp_path / "start")


def from_start(make: Make, start: str, **changes: object) -> RunConfig:
    return make(model="se_resnet8_cifar", model_options={}, init=start, **changes)


def test_the_checkpoint_says_how_images_are_prepared(tiny_config: Make, start: str) -> None:
    session = Session(from_start(tiny_config, start))
    assert session.data.preprocessing == THEIRS
    image, _ = session.data.val[0]
    first, _ = next(iter(session.val_loader))
    torch.testing.assert_close(first[0], THEIRS.transform()(image))
    assert next(session.batches(0))[0].shape[1:] == (3, 20, 20)


def test_explicit_options_go_first(tiny_config: Make, start: str) -> None:
    session = Session(from_start(tiny_config, start, image_size=10))
    assert session.data.preprocessing == THEIRS.resized(10)
    assert (THEIRS.resized(10).resize, THEIRS.resized(10).mean) == (12, THEIRS.mean)
    session = Session(from_start(tiny_config, start, recipe_normalisation="mean"))
    assert session.data.preprocessing.mean == THEIRS.mean
    assert session.data.preprocessing.std == (1.0, 1.0, 1.0)


def test_runs_and_their_evaluation_agree(tiny_config: Make, start: str) -> None:
    config = from_start(tiny_config, start, recipe_epochs=1)
    result = train(config)
    checkpoint = open_checkpoint(config.out)
    assert checkpoint.preprocessing == THEIRS
    found = evaluate_checkpoint(checkpoint, open_data(checkpoint, None, {}))
    assert found.loss == pytest.approx(result.evaluation.loss, rel=1e-5)
