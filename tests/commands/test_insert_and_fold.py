"""`senet insert`, `senet train --init`, `senet fold`: from a checkpoint to the next one."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.helpers.marks import separate_passes
from torch import nn

import senet
from senet.__main__ import main
from senet.anatomy import excitations
from senet.checkpoint.adapter import load_adapter
from senet.checkpoint.files import open_checkpoint
from senet.checkpoint.write import write_checkpoint
from senet.data import Preprocessing
from senet.errors import UserError
from senet.models import Network
from senet.models.description import describe
from senet.networks.anywhere import open_source

pytestmark = separate_passes  # what is left of a block after folding

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PREPROCESSING = Preprocessing(
    image_size=32, resize=36, mean=(0.5,) * 3, std=(0.5,) * 3, channels=3, interpolation="bilinear"
)
NET = """
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("val", 3)):
        for number, name in enumerate(("a", "b", "c")):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                colour = [40 + 20 * index] * 3
                colour[number] = 250
                Image.new("RGB", (40, 40), tuple(colour)).save(place / f"{index}.png")
    return folder


def write(folder: Path, model: Network) -> None:
    description = describe(model.config, PREPROCESSING.to_dict(), ("a", "b", "c"))
    write_checkpoint(folder, model.state_dict(), description)


@pytest.fixture
def base(tmp_path) -> Path:
    """A plain network's checkpoint."""
    model = senet.create_model("resnet8_cifar", num_classes=3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.3)
    write(tmp_path / "base", model)
    return tmp_path / "base"


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return open_checkpoint(path).model(X)


def trained(images: Path, init: Path, out: Path, *flags: str) -> Path:
    arguments = ("--epochs", "2", "--batch-size", "6", "--lr", "0.5", "--recipe", "quick")
    paths = ("--init", str(init), "--data", str(images), "--out", str(out))
    assert main(["train", *paths, *arguments, "--image-size", "32", *flags]) == 0
    return out


def test_gates_alone_learn_and_fit_onto_the_original(images, base, tmp_path, capsys):
    inserted = tmp_path / "inserted"
    assert main(["insert", "--weights", str(base), "--out", str(inserted), "--reduction", "2"]) == 0
    assert "3 SE blocks" in capsys.readouterr().out
    assert torch.equal(logits(inserted), logits(base))
    run = trained(images, inserted, tmp_path / "run", "--train", "se")
    before, after = (open_checkpoint(path).model.state_dict() for path in (inserted, run))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(".se." in key for key in changed), "the backbone and its statistics stay"
    original = open_checkpoint(base).model
    load_adapter(original, run / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(original(X), logits(run))
    assert (run / "adapter.safetensors").stat().st_size < 1.2 * 4 * sum(
        block.parameters for block in excitations(original).values()
    ) + 4096


def test_resumed_fine_tuning_is_the_uninterrupted_one(images, base, tmp_path):
    inserted = tmp_path / "inserted"
    main(["insert", "--weights", str(base), "--out", str(inserted), "--reduction", "2"])
    run = trained(images, inserted, tmp_path / "run", "--train", "se")
    config = (run / "config.toml").read_text()
    assert 'train = "se"' in config
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.toml"), "--out", str(again)]) == 0
    assert (again / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    assert main(["train", "--resume", str(again)]) == 0
    assert torch.equal(logits(again), logits(run))


def test_foreign_networks_and_a_new_head(images, tmp_path, capsys):
    (tmp_path / "net.py").write_text(NET)
    name = f"{tmp_path / 'net.py'}:make"
    torch.manual_seed(0)
    weights = open_source(name, num_classes=7)
    torch.save(weights.state_dict(), tmp_path / "weights.pth")
    inserted = tmp_path / "inserted"
    paths = ("--model", name, "--weights", str(tmp_path / "weights.pth"), "--out", str(inserted))
    assert main(["insert", *paths, "--num-classes", "7", "--image-size", "32"]) == 0
    assert torch.equal(logits(inserted), weights.eval()(X))
    capsys.readouterr()
    flags = ("--epochs", "1", "--batch-size", "6", "--recipe", "quick", "--image-size", "32")
    paths = ("--init", str(inserted), "--data", str(images), "--out", str(tmp_path / "run"))
    assert main(["train", *paths, *flags, "--train", "se"]) == 2
    assert "train the classifier too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    run = trained(images, inserted, tmp_path / "run", "--train", "se+head")
    assert logits(run).shape == (3, 3)
    original = open_source(name, num_classes=7)
    original.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    load_adapter(original, run / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(original.eval()(X), logits(run))


def test_fold_writes_what_evaluate_reads(images, tmp_path, capsys):
    model = senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2)
    with torch.no_grad():
        for block in excitations(model).values():
            block.module.fc2.weight[::2] = 0
        model.layer2[0].se.fc2.weight.zero_()
    write(tmp_path / "se", model)
    common = ("--data", str(images), "--tolerance", "1e-6", "--max-drop", "0")
    out = tmp_path / "folded"
    assert main(["fold", str(tmp_path / "se"), "--out", str(out), *common]) == 0
    printed = capsys.readouterr().out
    assert "removed" in printed
    assert "partial" in printed
    torch.testing.assert_close(logits(out), logits(tmp_path / "se"), rtol=1e-4, atol=1e-5)
    kinds = [type(m).__name__ for m in open_checkpoint(out).model.modules()]
    assert kinds.count("PartialExcitation") == 2
    assert kinds.count("SqueezeExcitation") == 0
    assert main(["evaluate", str(out), "--data", str(images)]) == 0


def test_bad_input_is_one_line_and_writes_nothing(images, base, tmp_path, capsys):
    out = tmp_path / "out"

    def says(message: str, *arguments: str) -> None:
        assert main([*arguments, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()

    insert = ("insert", "--weights", str(base))
    says("give a checkpoint, or --model", "insert")
    says("did you mean 'resnet18'", "insert", "--model", "torchvision:resnet1")
    says("timm has no model", "insert", "--model", "timm:nothing")
    says("no such file", "insert", "--model", "nothing.py:make")
    says("unknown model", "insert", "--model", "resnet8000")
    says("insert into resnet8_cifar", "insert", "--model", "se_resnet8_cifar")
    says("did you mean 'layer1'", *insert, "--where", "layer11")
    says("reduction must be positive", *insert, "--reduction", "-1")
    says("stages must be", *insert, "--stages", "9")
    says(
        "do not fit resnet20_cifar",
        "insert",
        "--model",
        "resnet20_cifar",
        "--weights",
        weights(tmp_path),
    )
    data = ("--data", str(images))
    says(
        "needs a network to start from", "train", "--model", "resnet8_cifar", *data, "--train", "se"
    )
    says("no SE blocks to train", "train", "--init", str(base), *data, "--train", "se")
    says("no SE blocks", "fold", str(base), *data)
    says("tolerance must be", "fold", str(se_checkpoint(tmp_path)), *data, "--tolerance", "-1")
    says("no such file", "fold", str(base), *data, "--statistics", str(tmp_path / "none"))


def weights(folder: Path) -> str:
    torch.save({"conv.weight": torch.zeros(1)}, folder / "w.pth")
    return str(folder / "w.pth")


def se_checkpoint(folder: Path) -> Path:
    model = senet.create_model("se_resnet8_cifar", num_classes=3)
    write(folder / "se", model)
    return folder / "se"


def test_adapters_of_other_networks_are_refused(images, base, tmp_path):
    inserted = tmp_path / "inserted"
    main(["insert", "--weights", str(base), "--out", str(inserted)])
    run = trained(images, inserted, tmp_path / "run", "--train", "se")
    other = senet.create_model("resnet50", num_classes=3)
    before = repr(other)
    with pytest.raises(UserError, match="of another network"):
        load_adapter(other, run / "adapter.safetensors")
    assert repr(other) == before
    with pytest.raises(UserError, match="is no adapter"):
        load_adapter(other, inserted / "model.safetensors")
    with pytest.raises(UserError, match="has SE already"):
        load_adapter(open_checkpoint(inserted).model, run / "adapter.safetensors")


SE_NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        gates = torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.project(x * gates)

def make(num_classes):
    torch.manual_seed(7)
    net = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    nn.init.zeros_(net[0].expand.weight)
    return net
"""


def test_networks_from_elsewhere_are_explained_and_folded(images, tmp_path, capsys):
    file = tmp_path / "net.py"
    file.write_text(SE_NET)
    model = ("--model", f"{file}:make", "--data", str(images), "--image-size", "32")
    network = open_source(f"{file}:make", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    weights = ("--weights", str(tmp_path / "weights.pth"))
    gates = tmp_path / "gates"
    assert main(["explain", *model, *weights, "--out", str(gates)]) == 0
    assert re.search(r"0.mul +│ sigmoid +│ +2 +│ +8 +│ +2 ", capsys.readouterr().out)
    assert (gates / "report.html").is_file()
    # Weights of another head: the gates are shown by the classes of the data all the same.
    other = open_source(f"{file}:make", num_classes=7)
    torch.save(other.state_dict(), tmp_path / "seven.pth")
    seven = ("--weights", str(tmp_path / "seven.pth"), "--num-classes", "7")
    assert main(["explain", *model, *seven, "--out", str(tmp_path / "seven")]) == 0
    out = tmp_path / "folded"
    assert main(["fold", *model, *weights, "--out", str(out), "--tolerance", "1e-6"]) == 0
    folded = open_checkpoint(out)
    assert folded.classes == ("a", "b", "c")
    assert folded.config == {}
    assert not excitations(folded.model, X)
    with torch.no_grad():
        torch.testing.assert_close(folded.model(X), network.eval()(X), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("timm:mobilenetv3_small_050",), "give one to make by --out"),
        (("timm:mobilenetv3_small_050", "--out", "x"), "give --data"),
        (("timm:mobilenetv3_small_05O", "--out", "x", "--data", "embedded"), "did you mean"),
    ],
)
def test_networks_by_name_need_data_and_a_folder(arguments, word, capsys):
    assert main(["explain", "--model", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_checkpoint_or_a_model(tmp_path, capsys):
    given = str(tmp_path), "--model", "timm:resnet18"
    assert main(["fold", *given, "--out", "x"]) == 2
    assert f"{tmp_path} says itself which network it is for" in capsys.readouterr().err
