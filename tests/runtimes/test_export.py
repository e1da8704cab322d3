"""senet.export: what is written runs in its own runtime and gives the same."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from senet.errors import SenetError, UserError
from senet.networks.create import create_model
from senet.runtimes import export as export_module
from senet.runtimes.export import TOLERANCE, export
from senet.runtimes.forms import Form, in_form
from senet.runtimes.sessions import open_exported

SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)
# The exporters' own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = tuple(f"class {index}" for index in range(10))
PREPROCESSING = {"image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("se_resnet8_cifar", num_classes=10, reduction=4)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("format", SUFFIX)
def test_any_batch_and_metadata(model: nn.Module, format: str, tmp_path: Path) -> None:
    path = tmp_path / f"network{SUFFIX[format]}"
    report = export(model, path, form="squeeze_first", classes=CLASSES, preprocessing=PREPROCESSING)
    assert report.format == format
    assert report.difference <= TOLERANCE
    assert report.inputs == 4  # the example, and random images of three batch sizes
    exported = open_exported(path)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            assert difference(exported.run(x), model(x)) <= TOLERANCE
    metadata = exported.metadata
    assert metadata["classes"] == list(CLASSES)
    assert metadata["preprocessing"] == PREPROCESSING
    assert metadata["input_size"] == [3, 32, 32]
    assert metadata["config"] == model.config
    assert metadata["form"] == "squeeze_first"
    left = {file.suffix for file in tmp_path.iterdir()}
    assert left == ({".xml", ".bin"} if format == "openvino" else {SUFFIX[format]})


def test_the_form_is_chosen_by_measurement(model: nn.Module, tmp_path: Path) -> None:
    report = export(model, tmp_path / "network.onnx", batch=2)
    # Behind a 3×3 convolution there is no expanded form.
    assert set(report.milliseconds) == {"plain", "squeeze_first"}
    fastest = min(report.milliseconds, key=lambda form: report.milliseconds[form])
    assert report.form == fastest
    assert open_exported(tmp_path / "network.onnx").metadata["form"] == fastest
    assert open_exported(tmp_path / "network.onnx").metadata["batch"] == 2


def test_the_expanded_form_has_no_broadcast_and_no_mean(tmp_path: Path) -> None:
    import onnx

    bottlenecks = create_model("se_resnet50", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    path = tmp_path / "network.onnx"
    export(bottlenecks, path, example_input=x, batch=1, form="expanded")
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in graph.value_info
    }
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("AveragePool") == 16
    assert kinds.count("ReduceMean") <= 1  # in front of the classifier
    scales = [node for node in graph.node if node.op_type == "Mul"]
    assert len(scales) == 16
    assert all(shapes[node.input[0]] == shapes[node.input[1]] for node in scales)


class Foreign(nn.Module):
    """A mobile block as other libraries write it: batch norm, SiLU, SE of 1×1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.reduce, self.restore = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.bn(self.expand(x)))
        s = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        x = self.project(x * self.restore(s).sigmoid())
        return self.fc(x.mean((2, 3)))


def test_a_foreign_network_in_all_forms(tmp_path: Path) -> None:
    """The rewritten graph has no batch norm, and its expanded form no mean and no broadcast."""
    import onnx

    model, x = Foreign().eval(), torch.randn(2, 3, 32, 32)
    report = export(model, tmp_path / "network.onnx", example_input=x, batch=2)
    assert set(report.milliseconds) == {"plain", "squeeze_first", "expanded"}
    assert report.form == min(report.milliseconds, key=lambda form: report.milliseconds[form])
    export(model, tmp_path / "expanded.onnx", example_input=x, batch=2, form="expanded")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "expanded.onnx")).graph
    shapes = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in graph.value_info
    }
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("AveragePool") == 1
    assert kinds.count("ReduceMean") + kinds.count("GlobalAveragePool") <= 1  # of the head
    assert "Resize" in kinds
    scale = [
        n for n in graph.node if n.op_type == "Mul" and shapes.get(n.input[0], [0])[1:2] == [16]
    ]
    assert all(shapes[node.input[0]] == shapes[node.input[1]] for node in scale)


def test_int8_of_a_foreign_network_keeps_its_gates_in_float(tmp_path: Path) -> None:
    model = Foreign().eval()
    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    with torch.no_grad():
        labelled = [(x, model(x).argmax(1)) for x in images]
    for form in ("plain", "squeeze_first"):
        path = tmp_path / f"{form}.onnx"
        report = export(model, path, example_input=images[0], calibration=labelled, form=form)
        assert report.quantized == 2  # expand and project
        assert report.accuracy["float32"] == 100
        assert 0 < report.accuracy["int8"] <= 100
        assert report.evaluated == 8


def test_free_size(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    export(model, path, any_size=True, form="squeeze_first")
    x = torch.randn(2, 3, 40, 72)
    with torch.no_grad():
        assert difference(open_exported(path).run(x), model(x)) <= TOLERANCE


class SameConv(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        x = nn.functional.pad(x, pads)
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


@pytest.mark.parametrize("form", ["plain", "squeeze_first"])
def test_networks_that_pad_to_the_same_size_at_any_size(form: Form, tmp_path: Path) -> None:
    """ONNX's convolution pads by itself: arithmetic on sizes takes minutes to export."""
    import onnx

    x = torch.randn(2, 3, 32, 32)
    layers = [
        SameConv(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SameConv(8, 8, 4, (3, 1), groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers).eval()
    path = tmp_path / "network.onnx"
    export(model, path, example_input=x, any_size=True, form=form)
    graph = onnx.load(path).graph
    assert [n.op_type for n in graph.node].count("Conv") == 2
    assert not {"Pad", "Shape"} & {node.op_type for node in graph.node}
    exported = open_exported(path)
    for size in ((33, 40), (16, 17), (50, 31)):
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            assert difference(exported.run(images), model(images)) <= TOLERANCE


def test_int8_keeps_the_gates_in_float(model: nn.Module, tmp_path: Path) -> None:
    import onnx

    images = [torch.randn(8, 3, 32, 32) for _ in range(4)]
    with torch.no_grad():
        calibration = [(x, model(x).argmax(1)) for x in images]
    path = tmp_path / "int8.onnx"
    report = export(model, path, calibration=calibration, form="squeeze_first")
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert report.quantized == convolutions
    assert report.accuracy["float32"] == 100
    assert report.accuracy["int8"] > 70
    assert open_exported(path).metadata["precision"] == "int8"
    graph = onnx.load(path).graph
    float_inputs = {tensor.name for tensor in graph.initializer if tensor.data_type == 1}
    gates = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    assert len(gates) >= 7  # two layers a block and the classifier
    assert all(float_inputs & set(node.input) for node in gates)


def test_a_file_that_differs_is_not_written(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(shaped: nn.Module, example: Tensor, form: str) -> nn.Module | None:
        made = in_form(shaped, example, form)
        assert made is not None
        with torch.no_grad():
            next(made.parameters()).mul_(1.001)
        return made

    monkeypatch.setattr(export_module, "in_form", wrong)
    path = tmp_path / "network.pt2"
    path.write_text("former")
    with pytest.raises(SenetError, match=r"differs from PyTorch by .* nothing was written"):
        export(model, path, form="plain")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("network.xyz", {}, r"must end in \.onnx or \.pt2 or \.xml"),
        ("network.pt2", {"format": "onnx"}, r"must end in \.onnx, got network\.pt2"),
        ("network.onnx", {"format": "tflite"}, "format must be one of"),
        ("network.onnx", {"form": "fast"}, "form must be one of"),
        ("network.onnx", {"form": "expanded"}, "needs a fixed batch"),
        ("network.onnx", {"batch": 0}, "batch must be at least 1"),
        ("network.pt2", {"calibration": []}, "needs format 'onnx'"),
        ("nowhere/network.onnx", {}, "no folder"),
        ("network.onnx", {"example_input": torch.zeros(3)}, r"tensor \(N,C,H,W\)"),
    ],
)
def test_bad_input(
    model: nn.Module, tmp_path: Path, name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(model, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


class Returning(nn.Module):
    """A tiny network, and a function of its images and result."""

    def __init__(self, result=lambda x, y: y, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4, 2)
        self.result = [result]

    def forward(self, x: Tensor) -> object:
        return self.result[0](x, self.fc(self.conv(x).relu().mean((2, 3))))


def tiny(**attributes: object) -> nn.Module:
    model = Returning().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["network.pt2", "network.onnx"])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x, y: {"out": y, "aux": 2 * y}, "returns a dict of 'out', 'aux', and a file has"),
        (lambda x, y: (y, 2 * y), "returns a tuple, .* returns one tensor"),
        (lambda x, y: y if x.sum() > 1e6 else -y, r"numbers taken out of tensors .*torch\.where"),
        (lambda x, y: y + (1 if float(x.sum()) > 0 else 2), r"numbers taken out .*torch\.where"),
    ],
)
def test_networks_that_no_file_can_hold(tmp_path: Path, result, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(Returning(result).eval(), tmp_path / name, example_input=IMAGES, form="plain")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 4}, "classes must be names in the order of the outputs, got 4"),
        ({"classes": "cat"}, "classes must be names in the order of the outputs, got 'cat'"),
        ({"classes": [torch.zeros(1)]}, "classes must be names, texts each"),
        (
            {"preprocessing": {"size": 8, "mean": torch.zeros(3)}},
            r"preprocessing is written .* got a Tensor for 'mean'; turn .* \.tolist\(\)",
        ),
        ({"preprocessing": nn.Identity()}, r"preprocessing is written .* got a Identity;"),
        ({"task": {"of": print}}, "task is written .* got a builtin_function_or_method for 'of'"),
    ],
)
def test_values_that_no_file_can_hold(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(tiny(), tmp_path / "network.pt2", example_input=IMAGES, form="plain", **options)
    assert list(tmp_path.iterdir()) == []


def test_attributes_of_other_libraries_stay_out_of_the_file(tmp_path: Path) -> None:
    model = tiny(
        config=argparse.Namespace(a=1),
        classes=4,
        preprocessing=nn.Identity(),
        task=print,
        input_size=8,
    )
    path = tmp_path / "network.pt2"
    export(model, path, form="plain")
    metadata = open_exported(path).metadata
    assert metadata["input_size"] == [3, 8, 8]  # one number: square images
    for name in ("config", "classes", "preprocessing", "task"):
        assert metadata[name] is None


@pytest.mark.parametrize("size", [None, (8, 8), "8", nn.Identity()])
def test_no_size_and_no_example(tmp_path: Path, size: object) -> None:
    with pytest.raises(UserError, match=r"example_input is needed: .*\(N,C,H,W\)"):
        export(tiny(input_size=size), tmp_path / "network.pt2")


def test_an_example_that_the_network_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not take example_input of shape \(2, 5, 8, 8\)"):
        export(tiny(), tmp_path / "network.pt2", example_input=torch.zeros(2, 5, 8, 8))


def test_a_network_that_cannot_be_copied(tmp_path: Path) -> None:
    model = tiny()
    model.last = model(IMAGES)
    with pytest.raises(UserError, match="holds last as a result of autograd; detach it"):
        export(model, tmp_path / "network.pt2", example_input=IMAGES)


def test_opening_what_is_no_network(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no exported network"):
        open_exported(tmp_path / "network.onnx")
    (tmp_path / "a.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="must end in"):
        open_exported(tmp_path / "a.json")
