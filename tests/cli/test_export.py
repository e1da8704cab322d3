"""`senet export`."""

from pathlib import Path

import pytest
import timm
import torch
from cli_tools import run
from safetensors.torch import load_file

import senet
from senet.runtimes.sessions import open_exported


def published(folder: Path, name: str, **options: object) -> Path:
    """A folder of save_pretrained with a network of 3 classes."""
    torch.manual_seed(0)
    model = senet.create_model(name, num_classes=3, **options)
    side = model.input_size[1]
    model.preprocessing = {
        "image_size": side, "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3,
        "interpolation": "bilinear",
    }  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "peer_name", "file"),
    [({}, "seresnet18", "w.pth"), ({"variant": "cadene"}, "legacy_seresnet18", "w.safetensors")],
)
def test_timm_loads_what_was_exported(
    options: dict[str, object],
    peer_name: str,
    file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = published(tmp_path / "net", "se_resnet18", **options)
    path = tmp_path / file
    found = run(capsys, "export", folder, path, "--format", "timm")
    assert found.code == 0, found.err
    call = f"timm.create_model({peer_name!r}, num_classes=3, in_chans=3)"
    assert found.out == f"{path}: {call} loads it with strict=True\n"
    peer = timm.create_model(peer_name, num_classes=3, in_chans=3).eval()
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    peer.load_state_dict(state, strict=True)
    model = senet.models.Network.from_pretrained(folder)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(peer(x), model(x), rtol=1e-5, atol=1e-5)
    # And back: the weights alone, with the network's name.
    back = run(capsys, "export", path, tmp_path / "b.pth", "--model", "se_resnet18",
               "--format", "timm")  # fmt: skip
    assert back.code == 0, back.err
    again = torch.load(tmp_path / "b.pth")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


@pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
def test_a_foreign_network_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.pt2"
    found = run(capsys, "export", path, "--model", "timm:mobilenetv3_small_050", "--image-size", 64,
                "--form", "squeeze_first")  # fmt: skip
    assert found.code == 0, found.err
    assert f"{path}: squeeze_first; at most" in found.out
    weights = tmp_path / "w.pth"
    model = timm.create_model("mobilenetv3_small_050").eval()
    torch.save(model.state_dict(), weights)
    found = run(capsys, "export", weights, path, "--model", "timm:mobilenetv3_small_050",
                "--image-size", 64, "--form", "squeeze_first")  # fmt: skip
    assert found.code == 0, found.err
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(open_exported(path).run(x), model(x), rtol=1e-4, atol=1e-4)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = published(tmp_path / "net", "se_resnet8_cifar")
    path = tmp_path / "w.pth"
    found = run(capsys, "export", folder, path, "--format", "timm")
    found.refused("export", "timm has no network se_resnet8_cifar")
    found = run(capsys, "export", folder, path, "--format", "tim")
    found.refused("export", "--format", "timm")
    found = run(capsys, "export", folder, path)
    found.refused("export", "--format")
    found = run(capsys, "export", tmp_path / "w.onnx")
    found.refused("export", "--model", "alone")
    changed = published(tmp_path / "tanh", "se_resnet18", gate="tanh")
    found = run(capsys, "export", changed, path, "--format", "timm")
    found.refused("export", "timm has no networks with gate=tanh")
    plain = published(tmp_path / "plain", "se_resnet18")
    found = run(capsys, "export", plain, tmp_path / "w.onnx", "--format", "timm")
    found.refused("export", "path must end in .safetensors or .pth")
    assert not path.exists()
