"""Statistics, table, figures and page of a comparison."""

import dataclasses
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from senet.cli.compare import comparison_table
from senet.reports import figures
from senet.reports.comparison import (
    Comparison,
    NetworkResult,
    PairedDifference,
    cost,
    to_json,
    verdict,
    write_report,
)
from senet.support.text import count, duration

CLASSES = ("cat", "dog & <b>", "owl")


def network(name: str, top1: tuple[float, ...], parameters: int = 1000) -> NetworkResult:
    history = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 1.2 / e, "top1": 50.0 + e} for e in (1, 2)
    ]
    return NetworkResult(
        name=name,
        parameters=parameters,
        multiply_adds=12_340_000,
        top1=top1,
        top5=tuple(100.0 for _ in top1),
        images_per_second=tuple(1000.0 for _ in top1),
        seconds=tuple(40.0 for _ in top1),
        histories=tuple(history for _ in top1),
        confusion=np.array([[8, 2, 0], [5, 5, 0], [0, 0, 10]]),
    )


@pytest.fixture
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    return Comparison(
        plain=network("resnet8_cifar", (60.0, 61.0, 62.0)),
        se=network("se_resnet8_cifar", (61.0, 60.0, 63.0), parameters=1100),
        data="embedded",
        recipe="quick",
        epochs=2,
        seeds=(0, 1, 2),
        validation_images=2000,
        classes=CLASSES,
        gates={
            "layer1.0.se": rng.uniform(0.5, 1.5, (3, 4)),
            "layer1.1.se": rng.uniform(0.5, 1.5, (3, 4)),
            "layer2.0.se": rng.uniform(0.5, 1.5, (3, 8)),
            "layer2.1.se": rng.uniform(0.5, 1.5, (3, 8)),
        },
        neutral_gate=1.0,
    )


def test_paired_difference_by_hand() -> None:
    # Differences 1, -1, 1: mean 1/3, sd 2/√3, half width 4.30265 · (2/√3) / √3.
    found = PairedDifference.of((60.0, 61.0, 62.0), (61.0, 60.0, 63.0))
    half = 4.302653 * 2 / 3
    assert found.mean == pytest.approx(1 / 3)
    assert (found.low, found.high) == (
        pytest.approx(1 / 3 - half, abs=1e-5),
        pytest.approx(1 / 3 + half, abs=1e-5),
    )
    assert not found.significant


def test_pairing_counts() -> None:
    # Both networks vary by 10 points from seed to seed, and SE is 1 better for each seed.
    found = PairedDifference.of((50.0, 60.0, 70.0), (51.0, 61.1, 70.9))
    assert found.significant
    assert 0.7 < found.low < 1 < found.high < 1.3


def test_one_seed_is_never_significant(comparison: Comparison) -> None:
    single = dataclasses.replace(
        comparison, plain=network("a", (60.0,)), se=network("se_a", (70.0,)), seeds=(0,)
    )
    assert math.isnan(single.difference.low)
    assert not single.difference.significant
    assert "shows nothing about SE" in verdict(single)
    assert json.loads(to_json(single))["top1_difference"]["interval_95"] is None


def test_paired_difference_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        PairedDifference.of((1.0, 2.0), (1.0,))


def test_verdict_says_what_the_interval_allows(comparison: Comparison) -> None:
    assert "not significant" in verdict(comparison)
    assert "-2.54 to +3.20" in verdict(comparison)
    better = dataclasses.replace(comparison, se=network("se", (61.0, 62.1, 63.0)))
    assert verdict(better).endswith("significant, SE is better here.")
    worse = dataclasses.replace(comparison, se=network("se", (59.0, 59.9, 61.0)))
    assert verdict(worse).endswith("significant, SE is worse here.")


def test_cost(comparison: Comparison) -> None:
    assert "10.0% parameters" in cost(comparison)
    assert "100% of the plain" in cost(comparison)


def test_table_shows_each_number(comparison: Comparison) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(comparison))
    text = console.export_text()
    for expected in (
        "1,000",
        "1,100",
        "12.34 M",
        "2 × 3",
        "61.00 ± 1.00",
        "61.33 ± 1.53",
        "100.00 ± 0.00",
        "1000 ± 0",
        "2 min 00 s",
        "seeds 0, 1, 2",
        "2,000 validation images",
    ):
        assert expected in text


class Page(HTMLParser):
    """The images and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        for name in ("src", "srcset", "href"):
            if name in values:
                self.links.append(str(values[name]))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_complete_and_self_contained(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path)
    names = {"learning_curves", "confusion_matrix", "gates_per_stage"}
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.parse(tmp_path / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    assert len(page.images) == 3
    assert all(len(str(image["alt"])) > 40 for image in page.images)
    assert len(page.links) == 6  # each figure light and dark
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "prefers-color-scheme: dark" in content
    assert "61.33 ± 1.53" in page.text
    assert "not significant" in page.text
    assert "<b>" not in content  # class names are text
    assert "dog & <b>" in page.text


def test_report_is_reproducible(comparison: Comparison, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(comparison, tmp_path / name)
    for file in ("report.html", "results.json", "figures/gates_per_stage.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_json_holds_every_number(comparison: Comparison) -> None:
    content = json.loads(to_json(comparison))
    assert content["plain"]["top1"] == [60.0, 61.0, 62.0]
    assert content["se"]["confusion"] == [[8, 2, 0], [5, 5, 0], [0, 0, 10]]
    assert content["se"]["histories"][0][1]["top1"] == 52.0
    assert content["top1_difference"]["mean"] == pytest.approx(1 / 3)
    np.testing.assert_array_equal(content["gates"]["layer2.0.se"], comparison.gates["layer2.0.se"])


def test_layers_of_the_gate_figure_follow_figure_6() -> None:
    gates = {
        f"layer{stage}.{block}.se": np.ones((1, 1))
        for stage, depth in ((1, 3), (2, 4), (3, 6), (4, 3))
        for block in range(depth)
    }
    assert figures.shown_layers(gates) == [
        "layer1.2.se",
        "layer2.3.se",
        "layer3.5.se",
        "layer4.0.se",
        "layer4.1.se",
        "layer4.2.se",
    ]


def test_gate_figure_shows_classes_and_mean(comparison: Comparison) -> None:
    figure = figures.gates_per_stage(comparison.gates, CLASSES, neutral=1.0)
    axes = figure.axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    values = comparison.gates["layer1.1.se"]
    np.testing.assert_allclose(lines["mean of all 3 classes"], values.mean(axis=0))
    np.testing.assert_allclose(lines["owl"], values[2])
    assert axes.get_ylabel() == "mean gate"


def test_learning_curves_show_mean_and_range() -> None:
    runs = [
        [{"epoch": 1, "train_loss": 2.0, "val_loss": 2.0, "top1": top1}] for top1 in (40.0, 60.0)
    ]
    axes = figures.learning_curves({"a": runs}).axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [50.0]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (40.0, 60.0)


def test_confusion_matrix_is_in_per_cent_of_the_true_class() -> None:
    counts = np.array([[30, 10], [0, 5]])
    figure = figures.confusion_matrix({"a": counts}, ("x", "y"))
    shown = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(shown, [[75, 25], [0, 100]])
    assert "77.8% correct" in figure.axes[0].get_title()
    numbers = sorted(text.get_text() for text in figure.axes[0].texts)
    assert numbers == ["100", "25", "75"]


def test_confusion_matrix_of_a_thousand_classes_has_no_labels() -> None:
    counts = np.eye(1000, dtype=np.int64)
    figure = figures.confusion_matrix({"a": counts}, [str(i) for i in range(1000)])
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_xticks()) < 20


def test_themes_differ_and_leave_matplotlib_as_it_was(comparison: Comparison) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    pictures = []
    for theme in ("light", "dark"):
        with figures.themed(theme):
            pictures.append(
                figures.render(
                    figures.learning_curves(
                        {"a": [[{"epoch": 1, "train_loss": 2.0, "val_loss": 2.0, "top1": 1.0}]]}
                    ),
                    "svg",
                )
            )
    assert pictures[0] != pictures[1]
    assert re.search(rb"#16181d", pictures[1])
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"),
     (7440, "2 h 04 min")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2773, "2,773"), (999_999, "999,999"), (25_557_032, "25.56 M"),
     (3_870_000_000, "3.870 G")],
)  # fmt: skip
def test_count(value: int, text: str) -> None:
    assert count(value) == text
