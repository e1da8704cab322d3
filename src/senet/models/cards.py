"""What the paper says about each network and ablation, beside our own counts (`cards.toml`)."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """An error that was published.

    Attributes:
        data: data set it was measured on.
        source: table of the paper, or "released" for the models its authors gave away.
        top1: top-1 error in percent.
        top5: top-5 error in percent; None where only one error was given.
    """

    data: str
    source: str
    top1: float
    top5: float | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """One network of the paper, or one row of its ablations.

    Attributes:
        name: name of the card: that of the network, or table and row of an ablation.
        network: name of the network in the registry.
        options: options that make it the paper's.
        parameters: parameters, counted by us.
        multiply_adds: multiply-adds of convolutions and matrix products at the network's
            `input_size`, counted by us.
        paper_parameters: parameters in millions, as the paper prints them; None if it does not.
        paper_gflops: multiply-adds in thousand millions, likewise.
        results: published errors.
        source: table that the printed counts are from.
        why: why ours differ from the printed counts; None where they agree to the digits given.
        note: what the paper leaves open and was chosen here.
    """

    name: str
    network: str
    options: dict[str, Any]
    parameters: int
    multiply_adds: int
    paper_parameters: str | None = None
    paper_gflops: str | None = None
    results: tuple[Result, ...] = ()
    source: str | None = None
    why: str | None = None
    note: str | None = None


@cache
def cards() -> dict[str, Card]:
    """All cards by name, in the order of the paper's tables."""
    text = resources.files("senet.models").joinpath("cards.toml").read_text(encoding="utf-8")
    loaded: dict[str, Card] = {}
    for name, fields in tomllib.loads(text).items():
        results = tuple(Result(**result) for result in fields.pop("results", ()))
        fields.setdefault("network", name)
        fields.setdefault("options", {})
        loaded[name] = Card(name=name, results=results, **fields)
    return loaded
