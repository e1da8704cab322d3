"""What images are labelled with: one class each, any number of labels, or numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from senet.errors import UserError

TaskName = Literal["classification", "multilabel", "regression"]
OUTPUTS: dict[TaskName, str] = {
    "classification": "classes",
    "multilabel": "labels",
    "regression": "numbers",
}
"""What a network's outputs are called."""
Label = str | tuple[str, ...] | tuple[float, ...]
"""Of one image: its class, the labels that it has, or its numbers."""
Target = int | Tensor
"""The same for a network: the number of the class, or (K,) float32."""

SEPARATORS = (";", "|")
"""What people write between several labels in one cell."""
_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True,
          "no": False, "yes": True}  # fmt: skip


class Labelling(NamedTuple):
    """The labels of a table.

    Attributes:
        task: what they are.
        labels: of each row.
        names: of the network's outputs where the columns say them; None: the labels do.
        note: what was chosen for the user, in words; "" where nothing was.
    """

    task: TaskName
    labels: list[Label]
    names: tuple[str, ...] | None
    note: str


def held(targets: Tensor) -> Tensor:
    """Targets as data sets hold them: class numbers (N,) int64, or (N,K) float32."""
    return targets.to(torch.int64 if targets.ndim == 1 else torch.float32)


def target_at(targets: Tensor, index: int) -> Target:
    """That of one image, of `held` targets."""
    return int(targets[index]) if targets.ndim == 1 else targets[index]


def batched(targets: Sequence[Target]) -> Tensor:
    """Those of several images: (N,) int64, or (N,K) float32."""
    if isinstance(targets[0], Tensor):
        return torch.stack([target for target in targets if isinstance(target, Tensor)])
    return torch.tensor(targets)


def targets_of(
    labels: Sequence[Label], task: TaskName, names: Sequence[str]
) -> tuple[Tensor, set[str]]:
    """The targets of images, (N,) int64 or (N,K) float32, and the labels that `names` lacks.

    Args:
        labels: of each image.
        task: what they are.
        names: of the network's outputs.
    """
    if task == "regression":
        return torch.tensor(labels, dtype=torch.float32).view(len(labels), len(names)), set()
    number = {name: index for index, name in enumerate(names)}
    if task == "classification":
        numbers = [number.get(str(label), -1) for label in labels]
        unknown = {str(label) for label in labels} - number.keys()
        return torch.tensor(numbers, dtype=torch.int64), unknown
    targets, unknown = torch.zeros(len(labels), len(names)), set()
    for row, several in enumerate(labels):
        for label in map(str, several):
            if label in number:
                targets[row, number[label]] = 1
            else:
                unknown.add(label)
    return targets, unknown


def images_of_each(targets: Tensor, task: TaskName, count: int) -> Tensor:
    """(count,) how many images each class or label has; of numbers all have them."""
    if task == "classification":
        return torch.bincount(targets, minlength=count)
    if task == "multilabel":
        return targets.sum(0).long()
    return torch.full((count,), len(targets))


def distinct(labels: Sequence[Label]) -> set[str]:
    """The classes or labels that occur."""
    return {each for label in labels for each in ((label,) if isinstance(label, str) else label)}  # type: ignore[misc]  # never asked of numbers


def read_labels(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    where: Callable[[int], str],
    name: str,
    task: TaskName | None,
    separator: str | None,
) -> Labelling:
    """The labels in the columns of a table.

    Several columns of 0 and 1 are labels that an image has or not, several columns of numbers are
    numbers. A single column holds classes, unless its cells are lists or some hold several labels
    with a separator between them that occur on their own too, or nearly all are different decimals.

    Args:
        columns: their names.
        rows: a cell for each column: texts, numbers, bools, lists of them, or None.
        where: what errors call a row.
        name: what errors call the table.
        task: what the columns hold; None: as above.
        separator: between the labels in a cell; None: one of `SEPARATORS`, where they are used.

    Raises:
        UserError: a cell that is none of this, or columns that do not fit the task.
    """
    if separator is not None and (not separator.strip() or len(columns) > 1):
        raise UserError(
            f"label_separator {separator!r} stands between the labels in the cells of one column"
        )
    note = ""
    found_separator = separator or (_separator(rows, task) if len(columns) == 1 else None)
    if task is None:
        task, why = _inferred(columns, rows, name, found_separator)
        if separator is not None:
            task, why = "multilabel", ""
        if why:
            note = f"task {task}: {why} (--task takes another)"
    if task == "classification":
        if len(columns) > 1:
            raise UserError(
                f"{name}: a class stands in one column, not in {', '.join(columns)}: give one "
                "label_column, or task multilabel or regression"
            )
        return Labelling(task, _classes(columns[0], rows, where), None, note)
    if task == "regression":
        return _numbers(columns, rows, where, note)
    if len(columns) > 1 or (separator is None and all(_flag(row[0]) is not None for row in rows)):
        return Labelling(task, _flagged(columns, rows, where), tuple(columns), note)
    labels = [tuple(dict.fromkeys(_parts(row[0], found_separator))) for row in rows]
    return Labelling(task, list(labels), None, note)


def _inferred(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], name: str, separator: str | None
) -> tuple[TaskName, str]:
    """What the columns hold, and why that is not simply classes."""
    numbers = all(_number(cell) is not None for row in rows for cell in row)
    if len(columns) > 1:
        shown = ", ".join(columns)
        if all(_flag(cell) is not None for row in rows for cell in row):
            return "multilabel", f"the columns {shown} hold 0 and 1"
        if numbers:
            return "regression", f"the columns {shown} hold numbers"
        raise UserError(
            f"{name}: the columns {shown} hold neither 0 and 1 (labels that an image has or not) "
            "nor numbers (regression) throughout: give one label_column"
        )
    cells = [row[0] for row in rows]
    if any(isinstance(cell, list) for cell in cells):
        if all(isinstance(each, float) for cell in cells for each in cell or ()):
            return "regression", f"the column {columns[0]!r} holds lists of numbers"
        return "multilabel", f"the column {columns[0]!r} holds lists"
    if separator is not None:
        return "multilabel", f"labels in the column {columns[0]!r} are separated by {separator!r}"
    values = {_number(cell) for cell in cells} if numbers else set()
    decimal = any(value is not None and not value.is_integer() for value in values)
    if decimal and len(values) > len(cells) / 2:  # as classes, most would have a single image
        return "regression", f"the column {columns[0]!r} holds decimal numbers, most of them once"
    return "classification", ""


def _separator(rows: Sequence[Sequence[Any]], task: TaskName | None) -> str | None:
    """The sign between labels, if some cells have several that are fewer than whole cells are.

    Classes such as "red|car" and "blue|van" stay whole, unless the task says that there are labels.
    """
    cells = {row[0] for row in rows if isinstance(row[0], str)}
    for sign in SEPARATORS:
        parts = {part for cell in cells for part in _parts(cell, sign)}
        used = any(sign in cell for cell in cells)
        if used and (task == "multilabel" or len(parts) < len(cells)):
            return sign
    return None


def _parts(cell: Any, separator: str | None) -> list[str]:
    if cell is None:
        return []
    if isinstance(cell, list):
        return [str(each) for each in cell]
    parts = str(cell).split(separator) if separator else [str(cell)]
    return [part.strip() for part in parts if part.strip()]


def _classes(
    column: str, rows: Sequence[Sequence[Any]], where: Callable[[int], str]
) -> list[Label]:
    labels: list[Label] = []
    for number, (cell,) in enumerate(rows):
        text = "" if cell is None else str(cell).strip()
        if not text:
            raise UserError(f"{where(number)}: no class in the column {column!r}")
        labels.append(text)
    return labels


def _flagged(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], where: Callable[[int], str]
) -> list[Label]:
    labels: list[Label] = []
    for number, row in enumerate(rows):
        flags = [_flag(cell) for cell in row]
        if None in flags:
            wrong = flags.index(None)
            raise UserError(
                f"{where(number)}: {row[wrong]!r} in the column {columns[wrong]!r} is neither 0 "
                "nor 1"
            )
        labels.append(tuple(name for name, flag in zip(columns, flags, strict=True) if flag))
    return labels


def _numbers(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], where: Callable[[int], str], note: str
) -> Labelling:
    names = tuple(columns)
    if len(columns) == 1 and rows and isinstance(rows[0][0], list):
        rows = [[] if row[0] is None else row[0] for row in rows]
        names = tuple(f"{columns[0]}_{index}" for index in range(len(rows[0])))
    labels: list[Label] = []
    for number, row in enumerate(rows):
        values = [_number(cell) for cell in row]
        if len(values) != len(names):
            raise UserError(f"{where(number)}: {len(values)} numbers instead of {len(names)}")
        if None in values:
            wrong = values.index(None)
            raise UserError(
                f"{where(number)}: {row[wrong]!r} in the column {names[wrong]!r} is no number"
            )
        labels.append(tuple(value for value in values if value is not None))
    return Labelling("regression", labels, names, note)


def _flag(cell: Any) -> bool | None:
    return _FLAGS.get(str(cell).strip().casefold())


def _number(cell: Any) -> float | None:
    """A finite number, or None."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
