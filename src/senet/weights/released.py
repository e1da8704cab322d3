"""Weights that others released for our networks: the table, and the file of one of them.

`released.csv` was made by scripts/released_weights.py from timm's own configuration and its table
of results. A network's best weights are those of the highest published top-1 whose licence allows
any use: those that forbid commercial use (cc-by-nc) are taken by their tag alone.
"""

import csv
import difflib
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from senet.errors import UserError
from senet.models.elsewhere import TIMM_NAMES, split_tag
from senet.support.hub import address, fetch

FILE = "model.safetensors"
PRETRAINED = "pretrained"  # in the place of a file: the best weights; with :TAG, those
_TABLE = Path(__file__).with_name("released.csv")


@dataclass(frozen=True)
class Released:
    """Weights of one of our networks that somebody released.

    Attributes:
        name: their name in timm, `seresnet50.ra2_in1k`; the part behind the dot is the tag.
        network: our network.
        repository: `owner/name` on the Hugging Face Hub; None where they are not there.
        url: the file as it was first released; None where only the Hub has it.
        layout: one of `senet.weights.LAYOUTS`.
        classes: classes of their last layer; 0 where they have none.
        preprocessing: how an image becomes the input, at the published accuracy; plain values.
        licence: SPDX name in lower case; None where timm does not say it.
        top1: published accuracy on ImageNet's 50,000 validation images in %; None where no number
            is known.
        top1_source: address at which `top1` stands; None where it is None.
    """

    name: str
    network: str
    repository: str | None
    url: str | None
    layout: str
    classes: int
    preprocessing: dict[str, Any]
    licence: str | None
    top1: float | None
    top1_source: str | None

    @property
    def tag(self) -> str:
        """What tells the weights of a network apart: `ra2_in1k`."""
        return self.name.partition(".")[2]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the network whose structure they were trained in, where that has its own."""
        ours = TIMM_NAMES.get(self.name.partition(".")[0])
        return {} if ours is None else dict(ours.options)

    @property
    def commercial(self) -> bool:
        """Whether the licence is known and does not forbid commercial use."""
        return self.licence is not None and "-nc" not in self.licence

    def preprocessing_of(self, channels: int) -> dict[str, Any] | None:
        """The preprocessing for a network of so many channels; None where they are no picture's."""
        if channels == 3:
            return dict(self.preprocessing)
        if channels != 1:
            return None
        grey = {key: [sum(self.preprocessing[key]) / 3] for key in ("mean", "std")}
        return {**self.preprocessing, **grey, "channels": 1, "channel_order": "rgb"}

    @property
    def place(self) -> str:
        """The address of the file."""
        return str(self.url) if self.repository is None else address(self.repository, FILE)

    def file(self) -> Path:
        """The file, from the Hub's cache of this machine or fetched into it.

        Raises:
            UserError: it cannot be fetched; the message says from where, and how to pass it.
        """
        passing = f'pass it: create_model("{self.name}", pretrained=FILE), or --model {self.name}'
        if self.repository is None:
            raise UserError(f"{self.name} is not on the Hub: fetch {self.url} and {passing}")
        try:
            return fetch(self.repository, FILE)
        except UserError as error:
            also = f" (or {self.url})" if self.url else ""
            raise UserError(f"{error}; fetch {self.place}{also} and {passing}") from error


def is_pretrained(source: object) -> bool:
    """Whether a source of weights is the word `pretrained`, or `pretrained:TAG`, not a file."""
    return str(source).partition(":")[0] == PRETRAINED


def released_or_file(
    name: str, source: str | PathLike[str]
) -> tuple[Released | None, str | PathLike[str]]:
    """Which released weights are meant, if any, and the file or repository to read.

    Args:
        name: a network's name; where it says a tag, that weights' preprocessing is meant, wherever
            the file comes from.
        source: `pretrained`, `pretrained:TAG`, or what `senet.weights.read_state_dict` takes.

    Raises:
        UserError: there are no such released weights, or they cannot be fetched.
    """
    if is_pretrained(source):
        found = find_released(name, str(source).partition(":")[2] or None)
        return found, found.file()
    return (find_released(name) if split_tag(name).tag else None), source


@cache
def all_released() -> tuple[Released, ...]:
    """All of them, a network's best one first."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        found = [_read(row) for row in csv.DictReader(file)]
    return tuple(sorted(found, key=lambda each: (each.network, not each.commercial, -_top1(each))))


def _top1(each: Released) -> float:
    return -1.0 if each.top1 is None else each.top1


def _read(row: dict[str, str]) -> Released:
    from_caffe = row["layout"] == "bninception"
    side, crop = int(row["image_size"]), float(row["crop_pct"])
    preprocessing = {
        "image_size": side,
        "resize": max(side, int(side / crop)),  # rounded down, as timm does
        "mean": [float(value) for value in row["mean"].split()],
        "std": [float(value) for value in row["std"].split()],
        "channels": 3,
        "interpolation": row["interpolation"],
        "channel_order": "bgr" if from_caffe else "rgb",
        "value_range": 255.0 if from_caffe else 1.0,
    }
    return Released(
        name=row["name"],
        network=row["network"],
        repository=row["repository"] or None,
        url=row["url"] or None,
        layout=row["layout"],
        classes=int(row["classes"]),
        preprocessing=preprocessing,
        licence=row["licence"] or None,
        top1=float(row["top1"]) if row["top1"] else None,
        top1_source=row["top1_source"] or None,
    )


def released_for(network: str) -> list[Released]:
    """The weights for one of our networks, the best one first; an empty list for none."""
    return [each for each in all_released() if each.network == network]


def find_released(name: str, tag: str | None = None) -> Released:
    """The weights that a name and a tag mean.

    Args:
        name: a network's name, ours or timm's, with or without a tag: `se_resnet50`,
            `seresnet50`, `se_resnet50.ra2_in1k`. timm's names leave out weights of other names
            there: `seresnet50` those of `legacy_seresnet50`.
        tag: the tag; None: that of the name, else the best ones. A whole name
            (`seresnet50.ra2_in1k`) will do.

    Raises:
        UserError: there are none for this network, or none of this tag; the message lists those
            that there are.
    """
    asked = split_tag(name)
    choice = released_for(asked.name)
    if asked.timm is not None:
        choice = [each for each in choice if each.name.partition(".")[0] == asked.timm]
    if not choice:
        with_some = sorted({each.network for each in all_released()})
        close = difflib.get_close_matches(asked.name, with_some, n=1, cutoff=0.5)
        hint = f"; {close[0]} has some" if close else ""
        raise UserError(
            f"no released weights of {asked.name} are known{hint}: give a file of any released "
            'layout (pretrained="model.safetensors") or a repository on the Hugging Face Hub '
            '(pretrained="hf_hub:owner/name")'
        )
    if asked.tag is not None and tag not in (None, asked.tag):
        raise UserError(f"{name} says {asked.tag} and pretrained says {tag}: leave one out")
    tag = tag or asked.tag
    if tag is None:
        return choice[0]
    found = [each for each in choice if tag in (each.tag, each.name)]
    if not found:
        tags = ", ".join(each.tag for each in choice)
        raise UserError(f"{asked.name} has no released weights {tag!r}; it has {tags}")
    return found[0]
