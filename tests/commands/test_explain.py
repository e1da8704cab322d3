"""The gate report: what is in its files, and what a user can do with it in a browser."""

import csv
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from chromium import Chromium, needs_chromium
from PIL import Image
from torch import nn

import senet
from senet.__main__ import main
from senet.checkpoint.write import write_checkpoint
from senet.commands.explain import explain
from senet.data import Preprocessing
from senet.errors import UserError
from senet.gates.statistics import GateStatistics
from senet.models.description import describe

CLASSES = ("<b>ape</b>", "bee & 'wasp'", "</script><script>alert(1)</script>")
TAB, ENTER = "\ue004", "\ue007"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of a small network whose gates differ by class, and images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("explain")
    names = ("a", "b", "c")
    for split, count in (("train", 2), ("val", 6)):
        for number, name in enumerate(names):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                colour = [40 + 20 * index] * 3
                colour[number] = 250
                Image.new("RGB", (40, 40), tuple(colour)).save(place / f"{index}.png")
    model = senet.create_model("se_resnet8_cifar", num_classes=3, reduction=2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, senet.SqueezeExcitation):
                nn.init.normal_(module.fc2.weight)
    preprocessing = Preprocessing(
        image_size=32,
        resize=36,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        channels=3,
        interpolation="bilinear",
    )
    description = describe(model.config, preprocessing.to_dict(), names)
    write_checkpoint(folder / "checkpoint", model.state_dict(), description)
    explain(folder / "checkpoint", folder / "gates", str(folder / "data"), batch_size=5)
    return folder


def test_tables_hold_the_statistics(folder):
    statistics = GateStatistics.load(folder / "gates" / "statistics.safetensors")
    assert statistics.images == 18
    with (folder / "gates" / "gates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 + 32 + 64
    block = statistics.blocks["layer2.0.se"]
    mine = [row for row in rows if row["block"] == "layer2.0.se"]
    for channel, row in enumerate(mine):
        assert int(row["channel"]) == channel
        assert float(row["mean"]) == pytest.approx(float(block.mean[channel]), rel=1e-4)
        assert float(row["q05"]) <= float(row["q50"]) <= float(row["q95"])
    with (folder / "gates" / "gates_by_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (16 + 32 + 64)
    one = next(
        r for r in rows if (r["block"], r["class"], r["channel"]) == ("layer3.0.se", "b", "7")
    )
    block = statistics.blocks["layer3.0.se"]
    assert int(one["images"]) == 6
    assert float(one["mean"]) == pytest.approx(float(block.class_mean[1, 7]), rel=1e-4)
    for name in ("gates_by_class", "gates_spread"):
        assert (folder / "gates" / "figures" / f"{name}.png").stat().st_size > 5000
        assert (folder / "gates" / "figures" / f"{name}.svg").read_text().startswith("<?xml")


def page_data(page: str) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text.group(1))


def renamed(folder: Path, target: Path) -> Path:
    """The report of the same gates for classes with names that are HTML."""
    from senet.reports.gates import explain_page

    statistics = GateStatistics.load(folder / "gates" / "statistics.safetensors")
    statistics.classes = CLASSES
    images = sorted((folder / "data" / "val").rglob("*.png"))
    page = explain_page(
        statistics,
        "Gates of <i>x</i>",
        "18 images & more",
        lambda position: (Image.open(images[position]), CLASSES[position // 6]),
    )
    target.write_text(page, encoding="utf-8")
    return target


def test_page_is_one_file_and_escapes_names(folder, tmp_path):
    page = renamed(folder, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>ape" not in page
    assert "alert(1)</script>" not in page
    assert "Gates of &lt;i&gt;x&lt;/i&gt;" in page
    assert "%%" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    data = page_data(page)
    assert data["classes"] == list(CLASSES)
    assert [block["name"] for block in data["blocks"]] == [
        f"layer{number}.0.se" for number in (1, 2, 3)
    ]
    assert all(image["source"].startswith("data:image/") for image in data["images"].values())
    top = GateStatistics.load(folder / "gates" / "statistics.safetensors").blocks["layer3.0.se"].top
    shown = data["blocks"][2]["top"][5]
    assert [image for image, _ in shown] == top.images[5].tolist()


def test_page_keeps_to_the_number_of_images(folder):
    from senet.reports.gates import explain_page

    statistics = GateStatistics.load(folder / "gates" / "statistics.safetensors")
    page = explain_page(statistics, "t", "s", lambda _: (Image.new("L", (28, 28)), "a"), images=10)
    data = page_data(page)
    assert 0 < len(data["images"]) <= 10
    for block in data["blocks"]:
        for channel in block["top"]:
            assert all(str(image) in data["images"] for image, _ in channel)


def test_bad_input_writes_nothing(folder, tmp_path, capsys):
    checkpoint, data = str(folder / "checkpoint"), str(folder / "data")
    out = tmp_path / "out"

    def says(message: str, *arguments: str) -> None:
        assert main(["explain", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    says("did you mean", checkpoint, "--data", data, "--out", str(out), "--classes", "aa")
    says("does not say what it was trained on", checkpoint, "--out", str(out))
    says("no checkpoint at", str(tmp_path / "none"), "--out", str(out))
    says("images must be at least 0", checkpoint, "--data", data, "--out", str(out), "--images=-1")
    plain = senet.create_model("resnet8_cifar", num_classes=3)
    description = describe(plain.config, preprocessing_of(checkpoint), ("a", "b", "c"))
    write_checkpoint(folder / "plain", plain.state_dict(), description)
    says("no SE blocks", str(folder / "plain"), "--data", data, "--out", str(out))
    with pytest.raises(UserError, match="exists and is never overwritten"):
        explain(folder / "checkpoint", folder / "gates", data)


def preprocessing_of(checkpoint: str) -> dict:
    from senet.checkpoint.files import open_checkpoint

    return open_checkpoint(checkpoint).preprocessing.to_dict()


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_report_in_a_browser(folder, tmp_path, width, dark):
    report = renamed(folder, tmp_path / "report.html")
    with Chromium(width, 900, dark=dark) as browser:
        browser.open(report)
        assert browser.text("h1") == "Gates of <i>x</i>"
        assert browser.run("return document.documentElement.dataset.theme") == (
            "dark" if dark else "light"
        )
        assert browser.run("return document.querySelectorAll('#blocks tr').length") == 3
        assert browser.text("#block-title") == "Block layer3.0.se"

        browser.click("#blocks tr:nth-child(1) button")
        assert browser.text("#block-title") == "Block layer1.0.se"
        assert browser.run("return document.activeElement.id") == "block-title"
        assert browser.text("#said") == "Block layer1.0.se"
        lines = browser.run(
            "return document.getElementById('channels').data.map(t => [t.name, t.y.length])"
        )
        assert [name for name, size in lines if name and size == 16] == [
            "mean of all 3 classes",
            "&lt;b&gt;ape&lt;/b&gt;",
            "bee &amp; 'wasp'",
        ]

        browser.run(
            "const s = document.getElementById('class-b'); s.value = 2;"
            "s.dispatchEvent(new Event('change'))"
        )
        assert browser.text("#head-b") == CLASSES[2]
        assert "alert" in browser.run("return document.getElementById('channels').data[4].name")

        # By keyboard alone: from the block's heading on to the first channel of the table.
        browser.run("document.getElementById('block-title').focus()")
        for _ in range(12):
            browser.press(TAB)
            if browser.run("return document.activeElement.closest('#separating') !== null"):
                break
        channel = browser.run("return document.activeElement.textContent")
        browser.press(ENTER)
        assert browser.text("#channel-title") == f"Channel {channel} of layer1.0.se"
        assert browser.run("return document.activeElement.id") == "channel-title"
        images = "return [...document.querySelectorAll('#images img')].map(i => i.alt)"
        assert len(browser.run(images)) == 9
        assert browser.run(
            "return [...document.querySelectorAll('#images img')].every("
            "i => { i.loading = 'eager'; return i.alt.startsWith('Image ') && "
            "i.src.startsWith('data:image/') })"
        )

        browser.run("document.getElementById('channel').value = ''")
        browser.type("#channel", "3" + ENTER)
        assert browser.text("#channel-title") == "Channel 3 of layer1.0.se"
        assert browser.run("return document.querySelectorAll('#class-rows tr').length") == 3

        # Nothing sticks out of a narrow window; wide tables scroll inside of themselves.
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.run(overflow) <= 0
        browser.run("window.scrollTo(0, 0)")
        browser.screenshot(tmp_path / "report.png")
        with Image.open(tmp_path / "report.png") as picture:
            assert picture.size[0] == width
        browser.click("#theme")
        assert browser.run("return document.documentElement.dataset.theme") == (
            "light" if dark else "dark"
        )
        ground = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if dark else "rgb(22, 24, 29)")

        assert not [line for line in browser.console() if line.startswith(("SEVERE", "WARNING"))]
        asked = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
        assert asked == [report.resolve().as_uri()]


@needs_chromium
def test_everything_that_acts_has_a_name_for_screen_readers(folder, tmp_path):
    report = renamed(folder, tmp_path / "report.html")
    with Chromium(800, 900) as browser:
        browser.open(report)
        nodes = browser.command("Accessibility.getFullAXTree", {})["nodes"]
        acting = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if node.get("role", {}).get("value")
            in ("button", "combobox", "checkbox", "spinbutton", "image", "table")
            and not node.get("ignored")
        ]
        assert {role for role, _ in acting} >= {"button", "combobox", "checkbox", "spinbutton"}
        assert all(name for _, name in acting), acting
        levels = browser.run(
            "return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])"
        )
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
