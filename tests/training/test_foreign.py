"""Networks of timm, torchvision and files are trained like ours, their tails in the operator."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from senet.checkpoint.files import model_for_weights, open_checkpoint, open_weights
from senet.commands.evaluate import evaluate_path
from senet.errors import UserError
from senet.fusion.forward import fused_forwards
from senet.networks.anywhere import is_foreign
from senet.training.config import RunConfig
from senet.training.loop import resume, train
from senet.training.session import Session

Make = Callable[..., RunConfig]
NET = """
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

def small(num_classes=10):
    return nn.Sequential(
        Conv2dNormActivation(3, 8, 3, activation_layer=nn.SiLU),
        SqueezeExcitation(8, 4, activation=nn.SiLU),
        nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small(3)

    def forward(self, x):
        y = self.body(x)
        return (y, y) if self.training else y

two = lambda num_classes: Two()
fixed = lambda: small(7)
"""
FILES = ("metrics.csv", "checkpoints/last/model.safetensors", "checkpoints/best/model.safetensors")


@pytest.fixture
def foreign(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(NET)

    def make(**changes: Any) -> RunConfig:
        model = f"{tmp_path / 'net.py'}:small"
        return tiny_config(**{"model": model, "model_options": {}, **changes})

    return make


def test_names() -> None:
    assert [is_foreign(n) for n in ("timm:a", "torchvision:b", "c.py:d", "se_resnet50")] == [
        *(True, True, True, False)
    ]


def test_its_tails_run_in_the_operator_and_the_average_too(foreign: Make) -> None:
    session = Session(foreign())
    assert [name for name, _, _ in fused_forwards(session.model)] == [""]
    assert session.ema is not None
    assert [name for name, _, _ in fused_forwards(session.ema.module)] == [""]
    assert list(fused_forwards(Session(foreign(fuse=False)).model)) == []


def test_fused_or_not_a_run_is_the_same_to_rounding(foreign: Make, tmp_path: Path) -> None:
    runs = []
    for fuse in (True, False):
        config = foreign(fuse=fuse, out=tmp_path / f"run{fuse}")
        runs.append(open_checkpoint(train(config).run).model.state_dict())
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[0][name], value, rtol=1e-3, atol=1e-4)


def test_interrupted_resumed_and_evaluated_from_anywhere(
    foreign: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = train(foreign(model="net.py:small", out=tmp_path / "whole")).run
    part = tmp_path / "part"
    half = foreign(model="net.py:small", out=part)
    steps = Session.train_step

    def stop(self: Session, images: Any, targets: Any, step: int, **options: Any) -> Any:
        if step == 9:
            raise KeyboardInterrupt
        return steps(self, images, targets, step, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(half)
    monkeypatch.chdir("/")
    resume(part)
    for name in FILES:
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    options = {"batch_size": 4, "workers": 0, "device": "cpu"}
    found = evaluate_path(part, None, {}, **options)
    assert found.checkpoint.model.config["name"] == str(tmp_path / "net.py:small")


def test_the_se_blocks_alone_from_weights(foreign: Make, tmp_path: Path) -> None:
    """Weights of its own state dict; everything but the blocks and the head stays."""
    torch.manual_seed(0)
    source = tmp_path / "weights.pth"
    before = timm.create_model("test_efficientnet", num_classes=5).state_dict()
    torch.save(before, source)
    config = foreign(
        model="timm:test_efficientnet",
        init=str(source),
        train="se+head",
        image_size=32,
        recipe_epochs=1,
    )
    after = open_checkpoint(train(config).run).model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    heads = {"classifier.weight", "classifier.bias"}
    assert heads < changed
    assert all(".se." in name for name in changed - heads)
    assert len(changed) > 6


def test_weights_of_a_network_by_name(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", num_classes=5).eval()
    source = tmp_path / "weights.pth"
    torch.save(model.state_dict(), source)
    x = torch.randn(1, 3, 32, 32)
    opened = open_weights("timm:test_efficientnet", source)
    assert torch.equal(opened.model(x), model(x))
    assert opened.classes == tuple("01234")
    with pytest.raises(UserError, match=r"do not fit timm:test_resnet: .* differs \(\d+ in all\)"):
        model_for_weights("timm:test_resnet", source)


def test_what_a_training_cannot_use_is_refused(foreign: Make, tmp_path: Path) -> None:
    where = tmp_path / "net.py"
    with pytest.raises(UserError, match=r"gives \(1, 7\) for an image where \(1, 3\) is needed"):
        Session(foreign(model=f"{where}:fixed"))
    session = Session(foreign(model=f"{where}:two"))
    images, targets = next(session.batches(0))
    with pytest.raises(UserError, match="gives tuple in training, not logits alone"):
        session.train_step(images, targets, 1)
    with pytest.raises(UserError, match="the model does not take example_input of shape"):
        Session(foreign(model="torchvision:inception_v3"))
    with pytest.raises(UserError, match="timm has no model 'nothing'"):
        Session(foreign(model="timm:nothing"))
    with pytest.raises(UserError, match=r"takes no options but without_se, got reduction"):
        foreign(model="timm:test_resnet", model_options={"reduction": 4})
    with pytest.raises(UserError, match=r"--no-fuse\) is for networks of timm.*calls the operator"):
        foreign(model="se_resnet8_cifar", fuse=False)


def test_configurations_from_before_are_read(foreign: Make, tmp_path: Path) -> None:
    config = foreign()
    values = copy.deepcopy(config.to_dict())
    del values["fuse"]
    assert RunConfig.from_dict(values) == config
    assert "fuse" not in config.result_options()
    assert foreign(fuse=False).result_options()["fuse"] is False
