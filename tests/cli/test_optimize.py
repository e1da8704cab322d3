"""`senet optimize`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import run
from PIL import Image

from senet import create_model
from senet.data import Preprocessing
from senet.networks.anywhere import open_source
from senet.runtimes.sessions import open_exported

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations


def test_report_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    out = tmp_path / "network.pt2"
    found = run(capsys, "optimize", "--model", "timm:mobilenetv3_small_050", "--image-size", 64,
                "--batch-size", 2, "--out", out, "--no-tune-allocator")  # fmt: skip
    assert found.code == 0, found.err
    assert "batch norm folded into the convolution │    34" in found.out
    assert "SE blocks: 9 of 9 fused" in found.out
    assert "kept: optimized" in found.out
    assert "outside of the kernels: nothing" in found.out
    exported = open_exported(out)
    assert exported.metadata["input_size"] == [3, 64, 64]
    assert exported.run(torch.randn(5, 3, 64, 64)).shape == (5, 1000)


def test_each_rewrite_without_times(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "optimize", "--model", "se_resnet8_cifar", "--each", "--no-measure",
                "--no-tune-allocator")  # fmt: skip
    assert found.code == 0, found.err
    assert "conv1: batch norm bn1 folded into the convolution" in found.out
    assert "time" not in found.out


def test_weights_of_a_run_and_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of save_pretrained is a network; a name takes weights from a file."""
    weights = tmp_path / "weights.pth"
    model = open_source("torchvision:resnet18")
    torch.save(model.state_dict(), weights)
    out = tmp_path / "network.pt2"
    found = run(capsys, "optimize", "--model", "torchvision:resnet18", "--weights", weights,
                "--image-size", 32, "--out", out, "--no-tune-allocator")  # fmt: skip
    assert found.code == 0, found.err
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_exported(out).run(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "task",
    [
        {"name": "regression", "mean": [1000.0, 5.0], "std": [300.0, 2.0], "error": "mse"},
        {"name": "multilabel", "thresholds": [0.25, 0.75]},
    ],
    ids=lambda task: task["name"],
)
def test_a_file_answers_as_its_checkpoint(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers in their own units, labels with their thresholds: not classes."""
    model = create_model("se_resnet8_cifar", num_classes=2)
    model.preprocessing = Preprocessing(16, 16, (0.5,) * 3, (0.25,) * 3).to_dict()
    model.classes, model.task = ("x", "y"), task
    model.save_pretrained(tmp_path / "network")
    image, out = tmp_path / "image.png", tmp_path / "network.pt2"
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(image)
    found = run(capsys, "optimize", "--model", tmp_path / "network", "--out", out, "--no-measure",
                "--no-tune-allocator")  # fmt: skip
    assert found.code == 0, found.err
    wanted, got = (
        json.loads(run(capsys, "predict", of, image, "--json").out)[0]["predictions"]
        for of in (tmp_path / "network", out)
    )
    for a, b in zip(wanted, got, strict=True):
        assert b == {
            key: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            for key, value in a.items()
        }


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = ("optimize", "--model", "se_resnet8_cifar", "--no-tune-allocator")
    run(capsys, *name, "--out", tmp_path / "x.onnx").refused("optimize", ".pt2", "x.onnx")
    run(capsys, *name, "--batch-size", 0).refused("optimize", "--batch-size", "0")
    run(capsys, *name, "--image-size", 0).refused("optimize", "--image-size", "0")
    run(capsys, *name[:2], "timm:none_such").refused("optimize", "none_such")
    (tmp_path / "run").mkdir()
    refused = run(capsys, *name[:2], tmp_path / "run", "--weights", tmp_path / "w.pth")
    refused.refused("optimize", "--weights")
