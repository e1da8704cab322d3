"""Names in figures are text: dollar signs, underscores, other scripts."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from senet.reports import figures, fonts

NAMES = ("US$$5", "$\\frac{", "_hidden", "[b]bold[/b]", "caf\udce9", "\x1b[31mred")
SHOWN = ("US$$5", "$\\frac{", "_hidden", "[b]bold[/b]", "caf\\xe9", "\\x1b[31mred")
PLANE_16 = "\U0010fffd"  # private use, in no font


def test_confusion_matrix_shows_names_as_they_are() -> None:
    with figures.themed():
        figure = figures.confusion_matrix({"net$1$": np.eye(6, dtype=int)}, NAMES)
        assert figures.render(figure, "svg")  # $ began a formula here, that was none
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(SHOWN)
    assert figure.axes[0].get_title() == "net$1$: 100.0% correct"
    assert not any(text.get_parse_math() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", NAMES)
def test_legends_show_every_name(name: str) -> None:
    row = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.0, "top1": 1.0}
    shown = SHOWN[NAMES.index(name)]
    with figures.themed():
        curves = figures.learning_curves({name: [[row]]})
        (label,) = curves.axes[0].get_legend().get_texts()
        assert label.get_text().strip() == shown
        gates = {f"{name}.0.se": np.full((2, 3), 0.5)}
        for figure in (
            figures.gates_per_stage(gates, [name, "other"]),
            figures.gates_spread(gates, gates, [name, "other"]),
        ):
            assert shown in [text.get_text().strip() for text in figure.legends[0].get_texts()]
            assert figures.render(figure, "svg")


def test_legends_lie_beside_the_curves() -> None:
    rows = [
        {"epoch": n, "train_loss": 2.0, "val_loss": 2.0, "top1": 1.0 + (n == 1)} for n in (1, 2, 3)
    ]
    with figures.themed():
        figure = figures.learning_curves({"a": [rows], "se_a": [rows]})
        figures.render(figure, "png")
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())


def test_a_name_in_another_script_gets_a_font_that_has_it() -> None:
    """Letters that the main font lacks and a further font of matplotlib's own has."""
    main = fonts._letters(fonts.findfont("DejaVu Sans"))
    letter, family = next(
        (chr_, entry.name)
        for entry in fontManager.ttflist
        if entry.name.startswith("STIX") and entry.weight == 400 and entry.style == "normal"
        for chr_ in sorted(fonts._letters(entry.fname) - main)
        if not fonts._mute(chr_)
    )
    with figures.themed():
        figure = figures.confusion_matrix({"a": np.eye(1, dtype=int)}, [letter])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figures.render(figure, "svg")
    (label,) = figure.axes[0].get_xticklabels()
    chosen = label.get_fontfamily()
    assert len(chosen) > 1
    files = [e.fname for e in fontManager.ttflist if e.name in chosen]
    assert any(letter in fonts._letters(file) for file in files), family


def test_one_sentence_where_no_font_has_a_letter(tmp_path: Path) -> None:
    with figures.themed():
        figure = figures.confusion_matrix({PLANE_16: np.eye(2, dtype=int)}, [PLANE_16, "a"])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            figures.save_figure(figure, tmp_path, "matrix")
    assert {str(each.message) for each in said} == {fonts.WITHOUT_GLYPHS}


def test_a_font_installed_since_matplotlib_listed_them_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upright = [e for e in fontManager.ttflist if e.weight == 400 and e.style == "normal"]
    stix = next(entry for entry in upright if entry.name == "STIXGeneral")
    others = [entry for entry in fontManager.ttflist if entry.name.startswith("DejaVu")]
    letters = fonts._letters(stix.fname).difference(*(fonts._letters(e.fname) for e in others))
    installed = tmp_path / "new.ttf"
    installed.write_bytes(Path(stix.fname).read_bytes())
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fontManager, "ttflist", others)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [*map(str, tmp_path.iterdir())])
    for cached in (fonts._fonts_with, fonts._add_new_fonts):
        cached.cache_clear()
    found, missing = fonts._fonts_with(frozenset(sorted(letters)[:1]))
    for cached in (fonts._fonts_with, fonts._add_new_fonts):
        cached.cache_clear()
    assert (found, missing) == (("STIXGeneral",), frozenset())
