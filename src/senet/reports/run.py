"""The page of a single run: curves, confusions, worst classes or labels, worst errors, gates."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from senet.reports.page import escape, page, picture, table
from senet.support.files import atomic_write
from senet.tasks.results import AnyResult, worst

WORST = 10  # classes that are shown
SIDE = 144  # pixels of a picture
_FIGURES = (
    ("learning_curves", "Learning curves", "on validation images, training and validation loss"),
    ("confusion_matrix", "Confusions", "per cent of each true class, of the last epoch"),
    ("predictions", "Predictions", "against the numbers of the validation images, last epoch"),
    ("gates_per_stage", "Gates", "mean gate of each channel by class, of the last checkpoint"),
)


@dataclass(frozen=True)
class ConfidentError:
    """An image that the network is sure about, and wrong.

    Attributes:
        picture: the image.
        truth: its class, a label that it has or not, or its numbers.
        taken_for: what the network takes it for.
        probability: of that, in [0, 1]; None of numbers.
    """

    picture: Image.Image
    truth: str
    taken_for: str
    probability: float | None

    @property
    def caption(self) -> str:
        share = "" if self.probability is None else f" ({100 * self.probability:.1f}%)"
        return f"{self.truth}, taken for {self.taken_for}{share}"


def write_run_page(
    run: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    parts_of: Sequence[AnyResult],
    errors: Sequence[ConfidentError],
) -> Path:
    """Write `report.html` into a run folder, with the figures that lie in `figures/`.

    Args:
        run: the run folder.
        title: of the page.
        facts: names and values to begin with.
        parts_of: the figures of each class, label or number, at least one.
        errors: the worst first.

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
    header = parts_of[0].HEADINGS
    rows = [each.cells() for each in worst(parts_of, WORST)]
    title_of = {"class": "Worst classes", "label": "Worst labels", "number": "Numbers"}[header[0]]
    parts.append(f"<section><h2>{title_of}</h2>{table(header, rows)}</section>")
    if errors:
        heading = "Largest errors" if errors[0].probability is None else "Most confident errors"
        shown = "".join(
            f"<figure>{picture(_png(each.picture), 'png', each.truth)}<figcaption>"
            f"{escape(each.caption)}</figcaption></figure>"
            for each in errors
        )
        parts.append(f'<section><h2>{heading}</h2><div class="pictures">{shown}</div></section>')
    atomic_write(run / "report.html", page(title, parts))
    return run / "report.html"


def _png(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "PNG")
    return content.getvalue()
