"""What people mean by the names of splits and columns, and data divided into two parts."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from senet.data.labels import TaskName
from senet.errors import UserError

T = TypeVar("T")
Split = Literal["train", "val", "test"]
_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}

LABELS = (
    "label", "labels", "class", "classes", "target", "category", "class_name", "label_name",
    "classname", "species", "breed", "y",
)  # fmt: skip
"""What people call the column of classes, where nothing else tells it."""


def split_of(name: str) -> Split | None:
    """Which split people mean by a name, in capitals or not; None: none."""
    return _NAMES.get(name.casefold())


def known_splits(parts: Mapping[str, T], where: str) -> dict[Split, tuple[str, T]]:
    """The parts whose names are those of splits, with these names.

    Args:
        parts: by the names that the data have for them.
        where: what errors call the data.

    Raises:
        UserError: two names for the same split.
    """
    found: dict[Split, tuple[str, T]] = {}
    for name, part in parts.items():
        split = split_of(name)
        if split is None:
            continue
        if split in found:
            raise UserError(
                f"{where} has both {found[split][0]!r} and {name!r}, which mean the same: rename "
                "or remove one of them"
            )
        found[split] = name, part
    return found


def evaluated(
    splits: Mapping[Split, tuple[str, T]], wanted: Split | None, where: str
) -> tuple[str, T] | None:
    """The part to evaluate on: the one that is wanted, else "val", else "test", else None.

    Raises:
        UserError: there is none of the wanted name.
    """
    if wanted is None:
        return splits.get("val", splits.get("test"))
    if wanted not in get_args(Split):
        raise UserError(f"split must be one of {', '.join(get_args(Split))}, got {wanted!r}")
    if wanted not in splits:
        names = ", ".join(name for name, _ in splits.values()) or "no splits"
        raise UserError(f"{where} has no split {wanted}, only {names}")
    return splits[wanted]


def divided(
    targets: Tensor, task: TaskName, names: Sequence[str], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices for training and evaluation: of each kind of image the same fraction.

    A kind is a class; of images with several labels those that share the label that is rarest of
    all data; of numbers all images are one kind.

    Args:
        targets: of all images, (N,) or (N,K).
        task: what they are.
        names: of the classes.
        val_fraction: part for evaluation, between 0 and 1.
        seed: of the choice.

    Raises:
        UserError: a class with a single image, or fewer than two images in all.
    """
    if task == "classification":
        return stratified_split(targets, names, val_fraction, seed)
    kinds = torch.zeros(len(targets), dtype=torch.int64)
    if task == "multilabel":
        counts = torch.where(targets > 0, targets.sum(0), torch.inf)
        kinds = torch.where(targets.any(1), counts.argmin(1), len(names))
    alone = torch.bincount(kinds)[kinds] < 2  # stay for training
    picked = torch.nonzero(~alone).flatten()
    if not len(picked):
        raise UserError(f"val_fraction {val_fraction} needs at least 2 images of a kind")
    found, kinds = kinds[picked].unique(return_inverse=True)
    _, val = stratified_split(kinds, [str(kind) for kind in found], val_fraction, seed)
    aside = set(picked[val].tolist())
    return [i for i in range(len(targets)) if i not in aside], sorted(aside)


def stratified_split(
    targets: Tensor, classes: Sequence[str], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices for training and evaluation: of each class the same fraction, at least one image."""
    generator = torch.Generator().manual_seed(seed)
    val: list[int] = []
    for label, name in enumerate(classes):
        members = torch.nonzero(targets == label).flatten()
        if len(members) < 2:
            raise UserError(
                f"class {name!r} has only {len(members)} image: val_fraction needs at least 2"
            )
        count = min(max(1, round(len(members) * val_fraction)), len(members) - 1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        val.extend(shuffled[:count].tolist())
    chosen = set(val)
    return [i for i in range(len(targets)) if i not in chosen], sorted(chosen)
