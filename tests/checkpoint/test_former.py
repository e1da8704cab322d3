"""What earlier versions wrote still opens: data/former.tar.xz, see scripts/."""

import csv
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.marks import separate_passes

from senet import load_adapter
from senet.checkpoint.files import open_checkpoint
from senet.gates.blocks import PartialExcitation
from senet.gates.statistics import GateStatistics
from senet.models import Network
from senet.training.loop import resume

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Logits of X by network, as the former version gave them; the folder is the current one."""
    with tarfile.open(Path(__file__).with_name("data") / "former.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SENET_TRUST_CODE", "1")  # net.py
    return load_file("logits.safetensors")


def same(model: torch.nn.Module, logits: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(X), logits, rtol=1e-4, atol=1e-4)


@separate_passes
@pytest.mark.parametrize(
    ("name", "network", "changed"),
    [
        ("plain", "resnet8_cifar", set()),
        ("inserted", "se_resnet8_cifar", set()),
        ("run", "se_resnet8_cifar", set()),
        ("folded", "se_resnet8_cifar", {"folded"}),
        ("foreign", "net.py:make", {"inserted"}),
        ("foreign-folded", "net.py:make", {"inserted", "folded"}),
    ],
)
def test_checkpoints(
    former: dict[str, torch.Tensor], name: str, network: str, changed: set[str]
) -> None:
    opened = open_checkpoint(name)
    assert opened.model.config["name"] == network
    assert opened.model.config.keys() & {"inserted", "folded"} == changed
    assert opened.classes == (tuple("012") if "foreign" in name else ("ant", "bee", "cow"))
    assert opened.preprocessing.image_size == 16
    assert bool(opened.config) == (name in ("run", "folded"))
    partial = any(isinstance(module, PartialExcitation) for module in opened.model.modules())
    assert partial == (name == "folded")
    same(opened.model, former[name])


def test_published_networks_adapters_and_statistics(former: dict[str, torch.Tensor]) -> None:
    model = Network.from_pretrained("plain")
    same(model, former["plain"])
    load_adapter(model, "whole/adapter.safetensors")
    same(model, former["adapter"])
    assert GateStatistics.load("gates/statistics.safetensors").blocks["2.se"].channels == 8


def test_a_stopped_run_goes_on(former: dict[str, torch.Tensor]) -> None:
    """The second epoch becomes what the former version made of it without the stop."""
    first = Path("run/metrics.csv").read_text()
    result = resume("run")
    assert Path("run/metrics.csv").read_text().startswith(first)
    with Path("whole/metrics.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in result.history] == [3, 6]
    assert result.history[1] == pytest.approx(rows[1], rel=1e-3)
