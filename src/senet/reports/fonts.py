"""Fonts for names in any script: a figure's texts get one that has their letters."""

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font
from matplotlib.text import Text

WITHOUT_GLYPHS = (
    "some names have characters that no font installed here has; figures show boxes for them: "
    "install a font that has them, such as Noto Sans CJK"
)


def find_letters(figure: Figure) -> None:
    """Give each text of a figure that needs them further fonts of this machine.

    One warning where no font has some of the letters.
    """
    lacking: set[str] = set()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        letters = frozenset(c for c in text.get_text() if not _mute(c))
        missing = letters - _letters(findfont(text.get_fontproperties()))
        if not missing:
            continue
        fonts, missing = _fonts_with(missing)
        if fonts:
            text.set_fontfamily([*text.get_fontfamily(), *fonts])
        lacking |= missing
    if lacking:
        warnings.warn(WITHOUT_GLYPHS, stacklevel=2)


def _mute(character: str) -> bool:
    """Whether a character is none that a font draws: a line's end, a joiner."""
    return unicodedata.category(character) in ("Cc", "Cf")


@cache
def _letters(path: str) -> frozenset[str]:
    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # gone since matplotlib listed it, or damaged
        return frozenset()
    # Fonts of fixed pixels, such as colour emoji, cannot be drawn at other sizes.
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


@cache
def _fonts_with(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that have the letters together, and the letters that none has."""
    found: list[str] = []
    for family, path in _installed():
        if not missing:
            break
        if missing & _letters(path):
            found.append(family)
            missing = missing - _letters(path)
    return tuple(found), missing


def _installed() -> Iterator[tuple[str, str]]:
    """Families of this machine with an upright font of usual weight, and its file, by name."""
    _add_new_fonts()
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        usual = entry.style == "normal" and entry.weight in (400, "normal", "regular", "book")
        # Matplotlib's own "Last Resort" has nothing but boxes.
        if usual and not entry.name.startswith("Last Resort"):
            yield entry.name, entry.fname


@cache
def _add_new_fonts() -> None:
    """Tell matplotlib of fonts that were installed since it listed those of this machine."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        with suppress(OSError, RuntimeError):  # damaged, or of a kind that it does not read
            fontManager.addfont(path)
