"""What an evaluation says of each class."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray


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

    name: str
    images: int
    recall: float
    precision: float
    f1: float
    taken_for: str
    mistakes: int


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


def worst(results: Sequence[ClassResult], count: int) -> list[ClassResult]:
    """Those with images of lowest F1, the lowest first."""
    return sorted((each for each in results if each.images), key=lambda each: each.f1)[:count]


def as_csv(results: Sequence[ClassResult]) -> str:
    """A line a class, behind a line of names; NaN is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(ClassResult))
    for each in results:
        writer.writerow("" if value != value else value for value in asdict(each).values())
    return text.getvalue()


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else float("nan")
