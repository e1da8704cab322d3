"""The task of a checkpoint, from the plain values that it keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from senet.tasks.classification import Classification
from senet.tasks.multilabel import MultiLabel
from senet.tasks.regression import Regression

AnyTask = Classification | MultiLabel | Regression


def from_dict(plain: Mapping[str, Any] | None, names: Sequence[str]) -> AnyTask:
    """The inverse of a task's `to_dict`.

    Args:
        plain: what it gave; None: classes.
        names: of the outputs.

    Raises:
        KeyError, TypeError, ValueError: these are no values of a task.
    """
    if plain is None:
        return Classification(tuple(names))
    match plain["name"]:
        case "classification":
            return Classification(tuple(names))
        case "multilabel":
            thresholds = plain["thresholds"]
            held = None if thresholds is None else tuple(map(float, thresholds))
            return MultiLabel(tuple(names), held)
        case "regression":
            mean, std = (tuple(map(float, plain[key])) for key in ("mean", "std"))
            return Regression(tuple(names), mean, std, plain["error"])
        case unknown:
            raise ValueError(f"unknown task {unknown!r}")
