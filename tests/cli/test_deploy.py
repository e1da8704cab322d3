"""`senet export` to runtimes, and `senet predict` with engines and exported files."""

import json
import re
from pathlib import Path

import pytest
from cli_tools import CLASSES, run
from PIL import Image

from senet.cli.export import ENDINGS
from senet.runtimes.sessions import SUFFIXES, open_exported

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)
# The exporters' own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = "--no-tune-allocator"


def predictions(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> dict[str, dict[str, float]]:
    """Probabilities by image and class."""
    found = run(capsys, "predict", *arguments, "--json", QUIET)
    assert (found.code, found.err) == (0, "")
    return {
        item["image"]: {p["class"]: p["probability"] for p in item["predictions"]}
        for item in json.loads(found.out)
    }


def test_int8_of_a_run(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.onnx"
    flags = ("--int8", "--calibration-images", 12, "--form", "squeeze_first")
    found = run(capsys, "export", trained, path, *flags, QUIET)
    assert found.code == 0, found.err
    rows = re.findall(r"│ (\w+)(, written)? +│ +[\d.]+ │ +([\d.]+) │", found.out)
    assert [row[:2] for row in rows] == [("squeeze_first", ""), ("int8", ", written")]
    assert "top-1 of 12 (%)" in found.out
    assert f"{path}: squeeze_first; at most " in found.out
    assert re.search(r"int8: \d+ convolutions", found.out)
    measured = json.loads(run(capsys, "evaluate", trained, "--json", QUIET).out)
    assert float(rows[0][2]) == pytest.approx(measured["top1"], abs=0.01)
    metadata = open_exported(path).metadata
    assert metadata["precision"] == "int8"
    assert tuple(metadata["classes"]) == CLASSES
    # And as many as validation says are right of the images that it is used on.
    shown = predictions(capsys, path, data / "val")
    right = sum(max(p, key=p.get) == Path(image).parent.name for image, p in shown.items())
    assert 100 * right / 12 == pytest.approx(float(rows[1][2]), abs=0.01)


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("a.pt2", ("--batch", 5)),
        ("a.pt2", ("--any-size",)),
        ("a.onnx", ("--any-size",)),
        ("a.xml", ("--image-size", 24)),
    ],
)
def test_an_exported_file_predicts_as_its_checkpoint(
    file: str,
    flags: tuple[object, ...],
    data: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / file
    found = run(capsys, "export", trained, path, "--form", "plain", "--data", data, *flags, QUIET)
    assert found.code == 0, found.err
    assert found.out.startswith(f"{path}: plain; at most ")
    images = data / "val"  # 12: a batch of 5 is filled up
    shown = predictions(capsys, path, images)
    assert len(shown) == 12
    if "--image-size" in flags:
        assert open_exported(path).metadata["input_size"] == [3, 24, 24]
        return
    wanted = predictions(capsys, trained, images)
    assert shown.keys() == wanted.keys()
    for image, probabilities in wanted.items():
        assert shown[image] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("engine", ["optimized", "onnx", "openvino"])
def test_engines_give_the_same(
    engine: str, data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = data / "val"
    wanted = predictions(capsys, trained, images, "--engine", "eager")
    shown = predictions(capsys, trained, images, "--engine", engine, "--batch-size", 5)
    for image, probabilities in wanted.items():
        assert shown[image] == pytest.approx(probabilities, abs=1e-5)


def test_images_a_second_are_shown(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, "predict", trained, data / "val", "--engine", "optimized", QUIET)
    assert found.code == 0, found.err
    assert re.search(r"optimized: \d[\d.e+]* images/s", found.out)
    # Broken images in every batch, and a batch of nothing else.
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    Image.new("RGB", (16, 16)).save(tmp_path / "3.png")
    found = run(capsys, "predict", trained, tmp_path, "--batch-size", 2, "--json", QUIET)
    assert found.code == 1
    assert [Path(item["image"]).name for item in json.loads(found.out)] == ["3.png"]
    assert found.err.count("cannot read") == 6


def test_unlabelled_images_calibrate(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, path = data / "val" / "red", tmp_path / "small.onnx"
    flags = ("--int8", "--form", "plain", "--data", images, "--batch", 2)
    found = run(capsys, "export", trained, path, *flags, QUIET)
    assert found.code == 0, found.err
    assert "top-1" not in found.out
    assert re.search(r"int8, written +│ +[\d.]+ │", found.out)


@pytest.mark.parametrize(
    ("file", "flags", "words"),
    [
        ("a.tflite", (), ("--format", ".onnx")),
        ("a.onnx", ("--format", "torch"), (".pt2", "a.onnx")),
        ("a.pth", ("--format", "timm", "--batch", 2), ("timm takes no --batch",)),
        ("a.pt2", ("--opset", 18), ("--opset", "ONNX, not of torch")),
        ("a.xml", ("--int8",), ("--int8", "ONNX, not of openvino")),
        ("a.onnx", ("--opset", 3, "--form", "plain"), ("opset 3",)),
        ("a.onnx", ("--calibration-images", 3), ("--calibration-images", "--int8")),
        ("a.onnx", ("--int8", "--calibration-images", 0), ("at least 1", "0")),
        ("a.onnx", ("--val-fraction", 0.1), ("--val-fraction", "--data")),
        ("a.onnx", ("--int8", "--data", "embedded"), ("num_classes differs",)),
        ("a.onnx", ("--image-size", 2), ("--image-size", "at least 4")),
        ("a.onnx", ("--form", "expanded"), ("fixed batch",)),
        ("a.onnx", ("--batch", 0), ("batch must be at least 1",)),
        ("nowhere/a.onnx", (), ("no folder",)),
    ],
)
def test_export_refuses(
    file: str,
    flags: tuple[object, ...],
    words: tuple[str, ...],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(capsys, "export", trained, tmp_path / file, *flags, QUIET).refused("export", *words)
    assert list(tmp_path.iterdir()) == []


def test_predict_refuses(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = data / "val" / "red" / "0.png"
    found = run(capsys, "predict", trained, image, "--batch-size", 0, QUIET)
    found.refused("predict", "--batch-size", "got 0")
    found = run(capsys, "predict", trained, image, "--engine", "fast", QUIET)
    found.refused("predict", "--engine", "optimized")
    path = tmp_path / "a.onnx"
    run(capsys, "predict", path, image, QUIET).refused("predict", str(path))
    for name in ("a.onnx", "a.pt2", "a.xml"):
        (tmp_path / name).write_text("hello")
        run(capsys, "predict", tmp_path / name, image, QUIET).refused("predict", name)
    for flags in (("--engine", "onnx"), ("--device", "cuda"), ("--model", "se_resnet50")):
        found = run(capsys, "predict", path, image, *flags, QUIET)
        found.refused("predict", f"leave out {flags[0]} {flags[1]}")


def test_the_endings_are_those_of_the_runtimes() -> None:
    assert {suffix: name for name, suffix in SUFFIXES.items()} == ENDINGS
