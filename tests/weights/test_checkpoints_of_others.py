"""Weights as others' training scripts leave them: averages, prefixes, counters, whole objects."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import senet
from senet.errors import UserError
from senet.models import Network
from senet.weights import LoadReport, load_weights, read_state_dict
from senet.weights.files import contents_of

State = dict[str, Tensor]


def make(name: str = "se_resnet8_cifar", classes: int = 4) -> Network:
    return senet.create_model(name, num_classes=classes).eval()


@pytest.fixture
def source() -> Network:
    torch.manual_seed(1)
    return make()


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def zeros(state: State) -> State:
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


def averaged(state: State) -> State:
    model = make()
    model.load_state_dict(state)
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def counted(state: State) -> State:
    """As thop leaves a network whose operations it has counted."""
    counters = {"total_ops": torch.zeros(1), "layer1.0.conv1.total_params": torch.zeros(1)}
    return {**counters, **state}


def in_the_middle(state: State) -> State:
    """A network one of whose parts was wrapped in DataParallel."""
    return {key.replace("layer2.", "layer2.module."): tensor for key, tensor in state.items()}


# What a file holds, and what of the report must be said: taken, prefix, number of dropped names.
CHECKPOINTS: dict[str, tuple[Callable[[State], Any], tuple[str, str, int]]] = {
    "AveragedModel": (averaged, ("", "", 1)),
    "AveragedModel in a checkpoint": (
        lambda s: {"model": zeros(s), "model_ema": averaged(s)},
        ("model_ema", "", 1),
    ),
    "state_dict_ema": (lambda s: {"state_dict_ema": s, "epoch": 3}, ("state_dict_ema", "", 0)),
    "both of timm": (
        lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "arch": "x"},
        ("state_dict_ema", "", 0),
    ),
    "an average that is empty": (
        lambda s: {"state_dict": s, "state_dict_ema": {}},
        ("state_dict", "", 0),
    ),
    "an average that is None": (lambda s: {"model": s, "ema": None}, ("model", "", 0)),
    "thop": (counted, ("", "", 2)),
    "a loss": (lambda s: {**s, "criterion.weight": torch.ones(4)}, ("", "", 1)),
    "Lightning": (
        lambda s: {"state_dict": {**behind("model.", s), "criterion.weight": torch.ones(4)}},
        ("state_dict", "model.", 1),
    ),
    "Lightning's net": (lambda s: {"state_dict": behind("net.", s)}, ("state_dict", "net.", 0)),
    "a backbone beside a neck": (
        lambda s: {**behind("backbone.", s), "neck.weight": torch.ones(3)},
        ("", "backbone.", 1),
    ),
    "MoCo": (
        lambda s: {
            "state_dict": {
                **behind("module.encoder_q.", s),
                **behind("module.encoder_k.", zeros(s)),
                "module.queue": torch.zeros(4, 8),
                "module.queue_ptr": torch.zeros(1),
            }
        },
        ("state_dict", "encoder_q.", 2),
    ),
    "SimSiam": (
        lambda s: {
            "state_dict": {
                **behind("module.encoder.", s),
                "module.predictor.0.weight": torch.zeros(3, 3),
            }
        },
        ("state_dict", "encoder.", 1),
    ),
    "an average beside the model": (
        lambda s: {**behind("model.", zeros(s)), **behind("ema_model.", s)},
        ("", "ema_model.", 0),
    ),
    "deep": (lambda s: behind("trainer.model.backbone.", s), ("", "trainer.model.backbone.", 0)),
    "DataParallel": (lambda s: behind("module.", s), ("", "", 0)),
    "DataParallel in the middle": (in_the_middle, ("", "", 0)),
    "compiled, of FSDP": (
        lambda s: behind("_orig_mod._fsdp_wrapped_module.model.", s),
        ("", "model.", 0),
    ),
    "numbers between tensors": (lambda s: {**s, "epoch": 3, "name": "x"}, ("", "", 2)),
    "arguments": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("runs"))},
        ("model", "", 0),
    ),
    "NumPy's numbers": (
        lambda s: {"state_dict": s, "best": np.float64(0.5), "seen": np.int64(3)},
        ("state_dict", "", 0),
    ),
    "NumPy's arrays": (lambda s: {"state_dict": s, "curve": np.arange(3.0)}, ("state_dict", "", 0)),
}


@pytest.mark.parametrize("in_a_file", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_others_checkpoints(source: Network, tmp_path: Path, kind: str, in_a_file: bool) -> None:
    wrap, (taken, prefix, dropped) = CHECKPOINTS[kind]
    held: Any = wrap(source.state_dict())
    model = make()
    if in_a_file:
        torch.save(held, tmp_path / "weights.pth")
        held = tmp_path / "weights.pth"
    report = load_weights(model, held)
    for key, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    if kind == "MoCo":
        dropped += len(source.state_dict())  # the other encoder
    if kind == "an average beside the model":
        dropped += len(source.state_dict())
    assert (report.taken, report.prefix, len(report.dropped)) == (taken, prefix, dropped)
    assert f"taken from {taken}" in str(report) or not taken
    assert f"behind {prefix}" in str(report) or not prefix


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_plain_values_are_not_loaded(source: Network, tmp_path: Path, format: str) -> None:
    """An object beside the weights stands empty: nothing of its class is run."""
    held = {"state_dict": source.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(held, tmp_path / "x.pth", _use_new_zipfile_serialization=format == "zip")
    before = set(torch.serialization.get_safe_globals())
    assert read_state_dict(tmp_path / "x.pth").keys() == source.state_dict().keys()
    assert set(torch.serialization.get_safe_globals()) == before


def test_any_module_and_its_own_prefix() -> None:
    """A network whose own names begin with what others put in front keeps them."""
    model = nn.ModuleDict({"backbone": nn.Linear(3, 2), "module": nn.Linear(2, 2)})
    other = nn.ModuleDict({"backbone": nn.Linear(3, 2), "module": nn.Linear(2, 2)})
    report = load_weights(model, {"state_dict": behind("model.", other.state_dict())})
    assert torch.equal(model["backbone"].weight, other["backbone"].weight)
    assert torch.equal(model["module"].weight, other["module"].weight)
    assert isinstance(report, LoadReport)
    assert (report.prefix, report.taken) == ("model.", "state_dict")
    only = nn.ModuleDict({"backbone": nn.Linear(3, 2)})
    assert load_weights(only, only.state_dict()).prefix == ""


def test_two_networks_of_which_none_is_the_one(source: Network) -> None:
    state = {**behind("left.", source.state_dict()), **behind("right.", source.state_dict())}
    with pytest.raises(UserError, match=r"2 networks in them fit \(left\., right\.\): give"):
        load_weights(make(), state)


def without_head(state: State) -> State:
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}


def with_projection(state: State) -> State:
    """As MoCo v2 and SimSiam: several layers in the classifier's place."""
    return {
        **without_head(state),
        "fc.0.weight": torch.ones(8, 64),
        "fc.2.weight": torch.ones(4, 8),
    }


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (without_head, r"have no last layer \(fc\) .*new_head=True"),
        (with_projection, r"weights' fc has another form \(fc.0.weight; fc.2.weight\): keep"),
    ],
)
def test_heads_that_do_not_fit(
    source: Network, wrap: Callable[[State], State], says: str, tmp_path: Path
) -> None:
    state, model = wrap(source.state_dict()), make(classes=7)
    head = model.fc.weight.clone()
    with pytest.raises(UserError, match=says):
        load_weights(model, state)
    report = load_weights(model, state, new_head=True)
    assert report.kept == ("fc.weight", "fc.bias")
    assert set(report.dropped) == {key for key in state if key.startswith("fc.")}
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    torch.save(state, tmp_path / "x.pth")
    again = senet.create_model("se_resnet8_cifar", num_classes=7, pretrained=tmp_path / "x.pth")
    assert torch.equal(again.conv1.weight, source.conv1.weight)


def test_a_head_without_bias(source: Network) -> None:
    state = {key: tensor for key, tensor in source.state_dict().items() if key != "fc.bias"}
    model = make()
    report = load_weights(model, state)
    assert report.zeroed == ("fc.bias",)
    assert "set to zero fc.bias" in str(report)
    assert torch.equal(model.fc.weight, source.fc.weight)
    assert not model.fc.bias.any()
    other = make(classes=7)
    assert load_weights(other, state, new_head=True).kept == ("fc.weight", "fc.bias")


class Own(nn.Module):
    """A network of somebody's own class, pickled as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize("format", ["zip", "legacy"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_whole_pickled_model(tmp_path: Path, format: str, inside: bool) -> None:
    path = tmp_path / "model.pth"
    held = {"model": Own(), "epoch": 3} if inside else Own()
    torch.save(held, path, _use_new_zipfile_serialization=format == "zip")
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    text = str(caught.value)
    assert re.search(
        r"whole pickled model.* loading \S+\.Own would run code; .*state_dict\(\)", text
    )
    assert "\x1b" not in text
    assert "\n" not in text
    assert text.endswith("torch.save(model.state_dict(), …)")


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for content in (b"", b"PK\x03\x04", b"<html>not found</html>", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pth cannot be read: \S") as caught:
            read_state_dict(path)
        text = str(caught.value)
        assert "\x1b" not in text
        assert "weights_only" not in text
        assert "\n" not in text


def test_pretrained_takes_files_and_says_what_else_it_is_given() -> None:
    with pytest.raises(UserError, match=r"no released weights of se_resnet8_cifar are.*hf_hub:"):
        senet.create_model("se_resnet8_cifar", pretrained=True)
    with pytest.raises(UserError, match=r"pretrained must be True, a tag, a file, .*got 3"):
        senet.create_model("se_resnet8_cifar", pretrained=3)
    assert isinstance(senet.create_model("se_resnet8_cifar", pretrained=False), Network)


STATE = {"a": torch.zeros(1)}
AVERAGE = {"decay": 0.9, "shadow_params": [torch.zeros(1)], "collected_params": None}  # torch_ema


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        ({"model": STATE, "ema": AVERAGE}, "model"),
        ({"model": {"name": "resnet50"}, "weights": STATE}, "weights"),
        ({"state_dict": {"model": {"depth": 3}, "net": STATE}, "params": STATE}, "state_dict.net"),
        ({"state_dict": {"ema": {}}, "params": STATE}, "params"),
        ({"model": {"name": "resnet50"}, **STATE}, ""),
        ({"model": STATE, "ema": STATE}, "ema"),
    ],
)
def test_the_first_part_that_holds_tensors(held: dict[str, Any], taken: str) -> None:
    found = contents_of(held)
    assert found.taken == taken
    assert found.state.keys() == STATE.keys()


def test_a_checkpoint_that_holds_itself() -> None:
    held: dict[str, Any] = {"name": "resnet50"}
    held["model"] = {"net": held}
    with pytest.raises(UserError, match="there is no state dict"):
        contents_of(held)
