"""The page of a single run: curves, confusions, worst classes, confident errors, gates."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from senet.reports.classes import class_results, worst
from senet.reports.page import escape, page, picture, table
from senet.support.files import atomic_write

WORST = 10  # classes that are shown
SIDE = 144  # pixels of a picture
_FIGURES = (
    ("learning_curves", "Learning curves", "validation top-1, training and validation loss"),
    ("confusion_matrix", "Confusions", "per cent of each true class, of the last epoch"),
    ("gates_per_stage", "Gates", "mean gate of each channel by class, of the last checkpoint"),
)


@dataclass(frozen=True)
class ConfidentError:
    """An image that the network is sure about, and wrong.

    Attributes:
        picture: the image.
        truth: its class.
        taken_for: what the network takes it for.
        probability: of that class, in [0, 1].
    """

    picture: Image.Image
    truth: str
    taken_for: str
    probability: float


def write_run_page(
    run: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    confusion: NDArray[np.int64],
    classes: Sequence[str],
    errors: Sequence[ConfidentError],
) -> Path:
    """Write `report.html` into a run folder, with the figures that lie in `figures/`.

    Args:
        run: the run folder.
        title: of the page.
        facts: names and values to begin with.
        confusion: (K,K) counts by true class (row) and predicted class (column).
        classes: K names.
        errors: the surest first.

    Returns:
        The file.
    """
    parts = [table(("", ""), facts)]
    for name, heading, text in _FIGURES:
        file = run / "figures" / f"{name}.svg"
        if file.is_file():
            shown = picture(file.read_bytes(), "svg+xml", f"{heading}: {text}")
            parts.append(
                f"<section><h2>{heading}</h2><figure>{shown}<figcaption>{text}</figcaption>"
                "</figure></section>"
            )
    rows = [
        (
            each.name,
            f"{each.images:,}",
            *(f"{value:.1f}" for value in (each.recall, each.precision, each.f1)),
            f"{each.taken_for} ({each.mistakes})" if each.mistakes else "",
        )
        for each in worst(class_results(confusion, classes), WORST)
    ]
    header = ("class", "images", "recall (%)", "precision (%)", "F1 (%)", "most often taken for")
    parts.append(f"<section><h2>Worst classes</h2>{table(header, rows)}</section>")
    if errors:
        shown = "".join(
            f"<figure>{picture(_png(each.picture), 'png', each.truth)}<figcaption>"
            f"{escape(each.truth)}, taken for {escape(each.taken_for)} "
            f"({100 * each.probability:.1f}%)</figcaption></figure>"
            for each in errors
        )
        parts.append(
            f'<section><h2>Most confident errors</h2><div class="pictures">{shown}</div></section>'
        )
    atomic_write(run / "report.html", page(title, parts))
    return run / "report.html"


def _png(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "PNG")
    return content.getvalue()
