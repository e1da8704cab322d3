"""`senet evaluate`, `predict`, `models` and `summary`."""

import json
import re
from pathlib import Path

import pytest
import torch
from cli_tools import CLASSES, make_data, make_images, run
from PIL import Image
from torchvision.transforms.v2 import functional as F

import senet
from senet.commands.summary import summarize_block
from senet.nn.block import SqueezeExcitation

QUIET = "--no-tune-allocator"


def last_row(run_folder: Path) -> dict[str, float]:
    header, *_, last = (run_folder / "metrics.csv").read_text().splitlines()
    return dict(zip(header.split(","), map(float, last.split(",")), strict=True))


@pytest.mark.parametrize("place", ["checkpoints/last", "checkpoints/last/model.safetensors"])
def test_evaluate_finds_what_the_training_found(
    place: str, data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, "evaluate", trained / place, "--data", data, "--json", QUIET)
    assert found.code == 0, found.err
    content, row = json.loads(found.out), last_row(trained)
    assert content["n"] == 12
    assert content["top1"] == pytest.approx(row["top1"])
    assert content["top3"] == 100.0
    assert content["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    assert content["classes"] == list(CLASSES)
    assert sum(map(sum, content["confusion"])) == 12


def test_evaluate_prints_a_table_and_draws(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without --data: the data of the training.
    found = run(capsys, "evaluate", trained, "--figures", tmp_path / "figures", QUIET)
    assert found.code == 0, found.err
    for word in ("se_resnet8_cifar", "top-1 (%)", "top-3 (%)", "loss", "images/s", " 12 "):
        assert word in found.out
    assert (tmp_path / "figures" / "confusion_matrix.png").is_file()


def test_evaluate_refuses_other_classes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = make_data(tmp_path / "two", classes=("blue", "green"))
    found = run(capsys, "evaluate", trained, "--data", two, QUIET)
    found.refused("evaluate", "num_classes", "3 classes", "2")
    other = make_data(tmp_path / "other", classes=("blue", "gras", "red"))
    found = run(capsys, "evaluate", trained, "--data", other, QUIET)
    found.refused("evaluate", "'green'", "'gras'")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", 0], ["batch_size", "0"]),
        (["--workers", -1], ["num_workers", "-1"]),
        (["--device", "gpu"], ["--device", "cuda"]),
        (["--image-size", 2], ["2", "the network takes 4 and more"]),
        (["--data", "nowhere"], ["unknown data set 'nowhere'"]),
    ],
)
def test_evaluate_refuses_bad_values(
    flags: list[object], words: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "evaluate", trained, *flags, QUIET).refused("evaluate", *words)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_no_checkpoint(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [] if command == "evaluate" else [make_images(tmp_path / "images")]
    found = run(capsys, command, tmp_path / "none", *images, QUIET)
    found.refused(command, str(tmp_path / "none"))
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    found = run(capsys, command, tmp_path / "bad.safetensors", *images, QUIET)
    found.refused(command, "bad.safetensors")


def test_predict_kinds_of_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = Image.new("RGB", (40, 20), (200, 40, 40))
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    red.save(folder / "a.png")
    red.convert("RGBA").save(folder / "b.png")
    red.convert("P").save(folder / "c.gif")
    red.convert("L").save(folder / "d.jpg")
    Image.new("I;16", (20, 40), 40_000).save(folder / "e.png")
    red.save(folder / "deeper" / "f.jpg")
    (folder / "notes.txt").write_text("no image")
    found = run(capsys, "predict", trained, folder, "--json", "--top", 2, QUIET)
    assert (found.code, found.err) == (0, "")
    content = json.loads(found.out)
    names = [str(Path(item["image"]).relative_to(folder)) for item in content]
    assert names == ["a.png", "b.png", "c.gif", "d.jpg", "deeper/f.jpg", "e.png"]
    for item in content:
        assert len(item["predictions"]) == 2
        first, second = (each["probability"] for each in item["predictions"])
        assert 1 >= first >= second >= 0
    assert content[0]["predictions"] == content[1]["predictions"]  # opaque RGBA is RGB


def test_predict_agrees_with_the_network(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from senet.checkpoint.files import open_checkpoint

    image = data / "val" / "red" / "0.png"
    found = run(capsys, "predict", trained, image, "--json", QUIET)
    checkpoint = open_checkpoint(trained)
    x = checkpoint.preprocessing.transform()(Image.open(image))[None]
    with torch.no_grad():
        expected = checkpoint.model(x).softmax(-1)[0]
    shown = {p["class"]: p["probability"] for p in json.loads(found.out)[0]["predictions"]}
    assert shown == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-5)


def test_predict_goes_on_after_a_broken_image(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 50).save(broken)
    broken.write_bytes(broken.read_bytes()[:400])
    good = data / "val" / "red" / "0.png"
    found = run(capsys, "predict", trained, good, broken, good, QUIET)
    assert found.code == 1
    named, total = found.err.splitlines()
    assert str(broken) in named
    assert "1 of 3" in total
    assert found.out.count("0.png") == 2
    widths = {len(line) for line in found.out.splitlines()}
    assert len(widths) == 1  # aligned


def test_predict_of_broken_images_only(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    found = run(capsys, "predict", trained, broken, QUIET)
    assert (found.code, found.out) == (1, "")
    found = run(capsys, "predict", trained, broken, "--json", QUIET)
    assert (found.code, json.loads(found.out)) == (1, [])


def test_predict_refuses(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run(capsys, "predict", trained, empty, QUIET).refused("predict", str(empty))
    absent = tmp_path / "absent.png"
    run(capsys, "predict", trained, absent, QUIET).refused("predict", str(absent))
    image = data / "val" / "red" / "0.png"
    found = run(capsys, "predict", trained, image, "--top", 0, QUIET)
    found.refused("predict", "--top", "got 0")


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "models", "*resnet[58]0")
    rows = re.findall(r"│ (\w+) +│ +([\d,]+) │ +([\d.]+ [MG]) │ +([\d× ]+) │", found.out)
    assert rows == [
        ("resnet50", "25,557,032", "4.089 G", "3 × 224 × 224"),
        ("se_resnet50", "28,088,024", "4.092 G", "3 × 224 × 224"),
    ]


def test_models_are_in_natural_order(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "models", "*resnet[2-5][04]_cifar")
    names = re.findall(r"^│ (\w+) ", found.out, re.MULTILINE)
    assert names == [
        "resnet20_cifar",
        "se_resnet20_cifar",
        "resnet44_cifar",
        "se_resnet44_cifar",
    ]


def test_models_refuses_a_pattern_without_match(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "models", "vgg99*").refused("models", "'vgg99*'")


def test_summary_of_the_seed_block(capsys: pytest.CaptureFixture[str]) -> None:
    # Counted by hand: 64·21 + 21 and 21·64 + 64 parameters.
    found = run(
        capsys, "summary", "block", "--channels", 64, "--reduction", 3, "--squeeze", "max",
        "--input", "64,128,128",
    )  # fmt: skip
    assert found.code == 0
    cells = [
        [cell.strip() for cell in line.strip("│┃").split("│")]
        for line in found.out.splitlines()
        if line.startswith("│")
    ]
    assert cells == [
        ["input", "", "[1, 64, 128, 128]", "", "4.00 MB"],
        ["squeeze", "pooling: max", "[1, 64, 1, 1]", "0", "0.00 MB"],
        ["fc1", "Linear", "[21]", "1,365", "0.00 MB"],
        ["activation", "ReLU", "[21]", "0", "0.00 MB"],
        ["fc2", "Linear", "[64]", "1,408", "0.00 MB"],
        ["gate", "Sigmoid", "[64]", "0", "0.00 MB"],
        ["scale", "x · gate", "[1, 64, 128, 128]", "0", "4.00 MB"],
        ["total", "", "", "2,773", "4.00 MB"],
    ]
    assert "all parameters trainable" in found.out


def test_block_summary_runs_on_real_tensors_and_leaves_no_hooks() -> None:
    block = SqueezeExcitation(8, 2, dims=3)
    found = summarize_block(block, (2, 3, 4))
    assert found.input_shape == (1, 8, 2, 3, 4)
    assert found.input_bytes == 8 * 24 * 4
    assert found.parameters == 8 * 4 + 4 + 4 * 8 + 8
    assert not any(module._forward_hooks for module in block.modules())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--channels", "--input"]),
        (["--channels", 32, "--input", "64,8,8"], ["--channels 32", "64,8,8"]),
        (["--input", "64"], ["--input", "64"]),
        (["--input", "64,0,8"], ["--input", "64,0,8"]),
        (["--channels", 64, "--stages", "2,3"], ["--stages", "a block has none"]),
        (["--channels", 64, "--reduction", 0], ["reduction", "0"]),
        (["--channels", 64, "--num-classes", 5], ["--num-classes"]),
    ],
)
def test_summary_of_a_block_refuses(
    flags: list[object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "summary", "block", *flags).refused("summary", *words)


def test_summary_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "summary", "se_resnet8_cifar", "--reduction", 4, "--input", "1,28,28")
    assert found.code == 0
    lines = found.out.splitlines()
    assert any(re.search(r"Linear \(fc1\) +\[1, 4\] +68 ", line) for line in lines)
    stem = next(line for line in lines if line.startswith("│ stem "))
    assert re.findall(r"[\d,]+", stem) == ["176", f"{144 * 28 * 28:,}", "0", "0"]
    whole = next(line for line in lines if line.startswith("│ all "))
    plain = run(capsys, "summary", "resnet8_cifar", "--input", "1,28,28").out.splitlines()
    plain_whole = next(line for line in plain if line.startswith("│ all "))
    se, without = (
        [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line)]
        for line in (whole, plain_whole)
    )
    assert se[2:] == [se[0] - without[0], se[1] - without[1]]
    assert any(re.search(r"Conv2d \(conv1\) +\[1, 16, 28, 28\] +144 ", line) for line in lines)
    assert lines[-1] == (
        "se_resnet8_cifar at 1 × 28 × 28: 77,830 parameters, 9.148 M multiply-adds"
    )


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "se_resnet8_cifar"])
def test_summary_of_the_se_blocks_of_any_network(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--input", "3,64,64") if name.startswith("timm:") else ()
    found = run(capsys, "summary", "--model", name, "--se", *flags)
    assert found.code == 0, found.err
    count = 9 if name.startswith("timm:") else 3
    assert re.search(rf"{name}: {count} SE blocks, [\d,]+ parameters", found.out)
    assert "blocks.4.2.se" in found.out or "layer3.0.se" in found.out


def test_summary_of_a_network_without_se(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "summary", "resnet8_cifar", "--se")
    assert found.out == "resnet8_cifar: 0 SE blocks\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["se_resnet5O"], ["unknown model", "did you mean 'se_resnet50'?"]),
        (["resnet50", "--reduction", 4], ["'reduction'", "se_resnet50"]),
        (["resnet50", "--input", "3,8,8"], ["3,8,8", "at least 32"]),
        (["resnet50", "--input", "3,224"], ["--input must be C,H,W"]),
        (["resnet50", "--channels", 3], ["--channels", "block"]),
        (["resnet50", "--model", "resnet18"], ["one network"]),
        (["--se"], ["one network"]),
        (["--model", "timm:resnet18"], ["timm:resnet18", "--se"]),
        (["block", "--se"], ["--se", "name"]),
        (["resnet50", "--width", 2], ["resnet50 has no option 'width'"]),
        (["mobilenet", "--width", 0], ["width", "0"]),
        (["resnet50", "--aux"], ["resnet50 has no option 'aux'"]),
        (["resnet20_cifar", "--preactivation"], ["no option 'preactivation'"]),
        (["resnet50", "--dropout", 0.5], ["no option 'dropout'"]),
        (["resnet50", "--variant", "cadene"], ["cadene"]),
        (["resnet50", "--num-classes", -1], ["num_classes", "-1"]),
    ],
)
def test_summary_of_a_network_refuses(
    arguments: list[object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "summary", *arguments).refused("summary", *words)


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        (["mobilenet", "--width", 0.5], 1_331_592),
        (["inception_v3", "--aux"], 27_161_264),
        (["resnet110_cifar", "--preactivation"], 1_727_962),
        (["se_resnet18", "--variant", "cadene"], 11_778_592),
        (["se_resnet18", "--divisor", 8, "--no-bias"], 11_777_576),
    ],
)
def test_options_that_few_networks_have(
    arguments: list[object], parameters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, "summary", *arguments)
    assert found.code == 0, found.err
    assert f" {parameters:,} parameters, " in found.out.splitlines()[-1]


def test_paper_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from senet.models import paper

    # tests/models/test_cards.py counts all of them, which takes its time.
    few = {name: paper.cards()[name] for name in ("resnet50", "se_resnet50")}
    monkeypatch.setattr(paper, "cards", lambda: few)
    found = run(capsys, "models", "--table")
    assert found.code == 0, found.err
    row = next(line for line in found.out.splitlines() if line.startswith("│ resnet50 "))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        "resnet50",
        *("24.80", "7.48", "3.86", "3.863", "25.6", "25.6"),
        *("23.29", "6.62", "3.87", "3.872", "28.1", "28.1"),
    ]
    run(capsys, "models", "se_*", "--table").refused("models", "--table", "'se_*'")


@pytest.fixture(scope="module")
def published(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from senet.checkpoint.files import open_checkpoint

    folder = tmp_path_factory.mktemp("published")
    open_checkpoint(trained).model.save_pretrained(folder)
    return folder


def test_a_published_folder_is_used_like_a_run(
    data: Path, trained: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = []
    for place in (trained, published):
        found = run(capsys, "evaluate", place, "--data", data, "--json", QUIET)
        assert found.code == 0, found.err
        content = json.loads(found.out)
        scores.append((content["top1"], content["loss"], content["classes"]))
    assert scores[0] == scores[1]
    images = data / "val" / "red"
    shown = [
        json.loads(run(capsys, "predict", place, images, "--json", QUIET).out)
        for place in (trained, published)
    ]
    assert shown[0] == shown[1]
    found = run(capsys, "evaluate", published, QUIET)
    found.refused("evaluate", "does not say what it was trained on", "--data")


@pytest.fixture(scope="module")
def caffe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that takes colours as Caffe has them, and says nothing else."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("caffe") / "bn_inception.pth"
    model = senet.create_model("bn_inception", num_classes=3)
    senet.save_weights(model, path, layout="bninception")
    return path


def test_weights_of_others_see_images_as_they_want_them(
    data: Path, caffe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = data / "val" / "red" / "0.png"
    found = run(capsys, "predict", caffe, image, "--model", "bn_inception", "--json", QUIET)
    assert found.code == 0, found.err
    shown = {p["class"]: p["probability"] for p in json.loads(found.out)[0]["predictions"]}
    model = senet.create_model("bn_inception", num_classes=3, pretrained=caffe).eval()
    pixels = F.pil_to_tensor(F.center_crop(F.resize(Image.open(image), [256]), [224]))
    x = pixels.flip(0) - torch.tensor([104.0, 117.0, 128.0])[:, None, None]
    with torch.no_grad():
        expected = model(x[None]).softmax(-1)[0]
    assert shown == pytest.approx(dict(zip("012", expected.tolist(), strict=True)), abs=1e-4)


def test_weights_of_others_are_evaluated_with_the_names_of_the_data(
    data: Path, caffe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "bn_inception", "--image-size", 64, "--json", QUIET]
    found = run(capsys, "evaluate", caffe, "--data", data, *flags)
    assert found.code == 0, found.err
    content = json.loads(found.out)
    assert (content["n"], content["classes"]) == (12, list(CLASSES))
    assert run(capsys, "evaluate", caffe, *flags).code == 2


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_weights_that_say_nothing_need_a_name(
    command: str, data: Path, caffe: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--data", data] if command == "evaluate" else [data / "val"]
    found = run(capsys, command, caffe, *rest, QUIET)
    found.refused(command, "bn_inception.pth", "--model NAME")
    named = trained / "checkpoints" / "best" / "model.safetensors"
    found = run(capsys, command, named, *rest, "--model", "se_resnet8_cifar", QUIET)
    found.refused(command, "leave out --model se_resnet8_cifar")
    found = run(capsys, command, caffe, *rest, "--model", "bn_incepton", QUIET)
    found.refused(command, "did you mean 'bn_inception'?")


def test_data_with_its_flag_or_without(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [run(capsys, "stats", *place, "--json") for place in ([data], ["--data", data])]
    assert asked[0].code == 0, asked[0].err
    assert asked[0].out == asked[1].out
    sharded = run(capsys, "shard", "--data", data, "--out", tmp_path / "shards")
    assert sharded.code == 0, sharded.err
    assert "36 images" in sharded.out


def test_a_checkpoint_with_any_flag_or_without(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((data / "val" / "red").iterdir())
    given: list[list[object]] = [[trained], ["--model", trained], ["--weights", trained]]
    answers = [run(capsys, "predict", *each, image, "--json") for each in given]
    answers.append(run(capsys, "predict", trained, "--data", image, "--json"))
    assert answers[0].code == 0, answers[0].err
    assert {answer.out for answer in answers} == {answers[0].out}
    judged = [json.loads(run(capsys, "evaluate", *each, "--json").out) for each in given]
    assert {each["loss"] for each in judged} == {judged[0]["loss"]}
    layers = run(capsys, "summary", trained, "--json")
    assert json.loads(layers.out)["shape"] == [3, 16, 16]
    assert "3 SE blocks" in run(capsys, "summary", "--model", trained, "--se").out


def test_what_cannot_be_meant(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = run(capsys, "evaluate", trained, "--weights", trained)
    both.refused("evaluate", "not both")
    named = run(capsys, "evaluate", trained, "--model", "se_resnet18")
    named.refused("evaluate", "leave out --model se_resnet18")
    begun = run(capsys, "train", "--model", trained, "--data", "embedded")
    begun.refused("train", "--init")
    run(capsys, "evaluate", "--model", "se_resnet18").refused("evaluate", "has no weights")
    run(capsys, "predict", "--model", trained).refused("predict", "give images")
    known = run(capsys, "summary", trained, "--num-classes", 5)
    known.refused("summary", "knows its own classes")
    printed = run(capsys, "predict", trained, "x.png", "--out", "x.csv")
    printed.refused("predict", "--out", "> FILE", "--csv")
    batch = run(capsys, "export", trained, "x.onnx", "--batch-size", 2)
    batch.refused("export", "Here that is --batch.")
