"""`senet optimize`."""

from pathlib import Path

import pytest
import torch
from cli_tools import run

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


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = ("optimize", "--model", "se_resnet8_cifar", "--no-tune-allocator")
    run(capsys, *name, "--out", tmp_path / "x.onnx").refused("optimize", ".pt2", "x.onnx")
    run(capsys, *name, "--batch-size", 0).refused("optimize", "--batch-size", "0")
    run(capsys, *name, "--image-size", 0).refused("optimize", "--image-size", "0")
    run(capsys, *name[:2], "timm:none_such").refused("optimize", "none_such")
    (tmp_path / "run").mkdir()
    refused = run(capsys, *name[:2], tmp_path / "run", "--weights", tmp_path / "w.pth")
    refused.refused("optimize", "--weights")
