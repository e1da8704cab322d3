"""What an evaluation says of each class, label or number."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

NAN = float("nan")


class Result(Protocol):
    """A line of the table of an evaluation; also a dataclass of plain values for CSV and JSON."""

    HEADINGS: ClassVar[tuple[str, ...]]

    @property
    def quality(self) -> float:
        """By which one is worse than another; NaN where there is nothing to judge."""
        ...

    def cells(self) -> tuple[str, ...]:
        """Beneath `HEADINGS`."""
        ...


@dataclass(frozen=True)
class ClassResult:
    """How well images of a class are told apart from the others.

    Attributes:
        name: of the class.
        images: of the class.
        recall: of these, those taken for it, %; NaN without images. (Its top-1 accuracy.)
        precision: of the images taken for it, those that are, %; NaN where none is.
        f1: harmonic mean of both, %: 2·right over (images + taken); NaN without either.
        taken_for: the class that its images are most often taken for by mistake; "" for none.
        mistakes: how many images that are.
    """

    HEADINGS: ClassVar = (
        "class", "images", "recall (%)", "precision (%)", "F1 (%)", "most often taken for",
    )  # fmt: skip

    name: str
    images: int
    recall: float
    precision: float
    f1: float
    taken_for: str
    mistakes: int

    @property
    def quality(self) -> float:
        return self.f1 if self.images else NAN

    def cells(self) -> tuple[str, ...]:
        figures = (f"{self.images:,}", *map(_tenths, (self.recall, self.precision, self.f1)))
        mistaken = f"{self.taken_for} ({self.mistakes})" if self.mistakes else ""
        return (self.name, *figures, mistaken)


@dataclass(frozen=True)
class LabelResult:
    """How well images that have a label are told from those that have not.

    Attributes:
        name: of the label.
        images: that have it.
        ap: average precision over all thresholds, %; NaN without images.
        recall: of these images, those whose probability reaches the threshold, %.
        precision: of the images that reach it, those that have the label, %; NaN where none does.
        f1: harmonic mean of both, %.
        threshold: from which on an image counts as having it, in (0, 1).
    """

    HEADINGS: ClassVar = (
        "label", "images", "AP (%)", "recall (%)", "precision (%)", "F1 (%)", "threshold",
    )  # fmt: skip

    name: str
    images: int
    ap: float
    recall: float
    precision: float
    f1: float
    threshold: float

    @property
    def quality(self) -> float:
        return self.ap

    def cells(self) -> tuple[str, ...]:
        shares = map(_tenths, (self.ap, self.recall, self.precision, self.f1))
        return (self.name, f"{self.images:,}", *shares, f"{self.threshold:.3f}")


@dataclass(frozen=True)
class NumberResult:
    """How well a number is predicted.

    Attributes:
        name: of the number.
        r2: coefficient of determination: 1 − squared error over the variance; 1 is exact, 0 is
            what their mean gives.
        mae: mean absolute error, in the number's own unit.
        rmse: root of the mean squared error, likewise.
    """

    HEADINGS: ClassVar = ("number", "R²", "MAE", "RMSE")

    name: str
    r2: float
    mae: float
    rmse: float

    @property
    def quality(self) -> float:
        return self.r2

    def cells(self) -> tuple[str, ...]:
        return (self.name, f"{self.r2:.4f}", f"{self.mae:.4g}", f"{self.rmse:.4g}")


AnyResult = ClassResult | LabelResult | NumberResult


def class_results(confusion: NDArray[np.int64], classes: Sequence[str]) -> list[ClassResult]:
    """A result a class, in their order.

    Args:
        confusion: (K,K) counts by true class (row) and predicted class (column).
        classes: K names.
    """
    found = []
    for number, name in enumerate(classes):
        right, images = int(confusion[number, number]), int(confusion[number].sum())
        taken = int(confusion[:, number].sum())
        wrong = confusion[number].copy()
        wrong[number] = 0
        most = int(wrong.argmax())
        found.append(
            ClassResult(
                name=name,
                images=images,
                recall=_percent(right, images),
                precision=_percent(right, taken),
                f1=_percent(2 * right, images + taken),
                taken_for=classes[most] if wrong[most] else "",
                mistakes=int(wrong[most]),
            )
        )
    return found


def worst(results: Sequence[AnyResult], count: int) -> list[AnyResult]:
    """Those of lowest F1, AP or R², the lowest first, without those that nobody can judge."""
    judged = [each for each in results if each.quality == each.quality]
    return sorted(judged, key=lambda each: each.quality)[:count]


def as_csv(results: Sequence[AnyResult]) -> str:
    """A line each, behind a line of names; NaN is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(results[0]))
    for each in results:
        writer.writerow("" if value != value else value for value in asdict(each).values())
    return text.getvalue()


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else NAN


def _tenths(value: float) -> str:
    return "" if value != value else f"{value:.1f}"
