"""The paper's ablations (tables 10 to 16) as a list of runs over one recipe and data set."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from senet.checkpoint.files import open_checkpoint
from senet.data.image_data import only_classes
from senet.errors import UserError
from senet.experiments.compare import (
    TRAIN_BOTH,
    CompareConfig,
    Watch,
    make_folder,
    train_all,
)
from senet.experiments.runs import read_rows
from senet.models import build_model, entry
from senet.models.cards import Card, cards
from senet.models.cost import count_multiply_adds, count_parameters
from senet.reports.comparison import PairedDifference
from senet.support.files import atomic_write
from senet.training.config import RunConfig
from senet.training.data import open_run_data

Ablation = Literal["reduction", "squeeze", "excitation", "stages", "integration", "nosqueeze"]
# By ablation: the paper's rows, named by their cards, and the options that make them. None is the
# network without SE.
ABLATIONS: Mapping[Ablation, Mapping[str, Mapping[str, Any] | None]] = {
    "reduction": {
        **{f"table 10, r={r}": {"reduction": r} for r in (2, 4, 8, 16, 32)},
        "table 10, plain": None,
    },
    "squeeze": {f"table 11, {kind}": {"squeeze": kind} for kind in ("max", "avg")},
    "excitation": {f"table 12, {gate}": {"gate": gate} for gate in ("relu", "tanh", "sigmoid")},
    "stages": {
        "table 13, plain": None,
        **{f"table 13, stage {stage}": {"stages": (stage,)} for stage in (2, 3, 4)},
        "table 13, all stages": {},
    },
    "integration": {
        "table 14, SE": {"integration": "standard"},
        "table 14, SE-PRE": {"integration": "pre"},
        "table 14, SE-POST": {"integration": "post"},
        "table 14, SE-Identity": {"integration": "identity"},
        "table 15, SE_3x3": {"integration": "3x3"},
    },
    "nosqueeze": {
        "table 10, plain": None,
        "table 16, NoSqueeze": {"squeeze": "none"},
        "table 10, r=16": {"squeeze": "avg"},
    },
}
# Rows that are called otherwise than in their own table: theirs is the paper's network, whatever
# the reduction.
LABELS: Mapping[tuple[str, str], str] = {("nosqueeze", "table 10, r=16"): "SE"}
# The variant from which the others are told apart: the network without SE, or else the paper's.
_BASES: Mapping[Ablation, str] = {
    **dict.fromkeys(("reduction", "stages", "nosqueeze"), "plain"),
    "squeeze": "avg",
    "excitation": "sigmoid",
    "integration": "SE",
}
RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class AblateConfig(CompareConfig):
    """An ablation: the fields of a comparison, and

    Attributes:
        ablation: which one.

    Raises:
        UserError: unknown ablation, a network that lacks one of the variants, an
            SE option that the ablation varies itself, or as for `CompareConfig`.
    """

    OWN: ClassVar[tuple[str, ...]] = (*CompareConfig.OWN, "ablation")
    COMMAND: ClassVar[str] = "ablate"

    ablation: Ablation

    def __post_init__(self) -> None:
        if self.ablation not in ABLATIONS:
            known = ", ".join(get_args(Ablation))
            raise UserError(f"ablation must be one of {known}, got {self.ablation!r}")
        varied = {key for options in self.variants.values() for key in options or ()}
        if wrong := varied & self.se_options.keys():
            name = wrong.pop()
            raise UserError(f"leave out {name}: the ablation {self.ablation} varies it itself")
        if self.foreign:
            raise UserError(
                f"the ablations vary networks of this package (senet models), not {self.model}"
            )
        super().__post_init__()
        fixed = {key: value for key, value in self.se_options.items() if key not in varied}
        object.__setattr__(self, "se_options", fixed)
        for name, options in self.variants.items():
            network, all_options = self._network(options)
            try:
                with torch.device("meta"):
                    build_model(network, **all_options)
            except (UserError, ValueError) as error:
                raise UserError(f"{network} has no variant {name!r}: {error}") from error

    @property
    def variants(self) -> Mapping[str, Mapping[str, Any] | None]:
        """Options of each variant by the name of its card."""
        return ABLATIONS[self.ablation]

    def _network(self, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
        if options is None:
            return self.model, dict(self.model_options)
        return entry(self.model).twin, {**self.model_options, **self.se_options, **options}

    def runs(self) -> dict[str, list[RunConfig]]:
        """The runs of each variant in the order of the seeds."""
        return {
            name: self._seeds(folder_of(label_of(self.ablation, name)), *self._network(options))
            for name, options in self.variants.items()
        }

    @property
    def base(self) -> str:
        """What the variant is called from which the others are told apart."""
        return _BASES[self.ablation]

    @property
    def order(self) -> list[RunConfig]:
        """All runs: each variant with seed 0, then with seed 1, …."""
        return [run for runs in zip(*self.runs().values(), strict=True) for run in runs]


def label_of(ablation: str, name: str) -> str:
    """What a variant is called: "table 10, r=2" → "r=2"."""
    return LABELS.get((ablation, name), name.partition(", ")[2])


def folder_of(label: str) -> str:
    """Folder of a variant: "r=2" → "r_2"."""
    return re.sub(r"\W+", "_", label.lower())


@dataclass(frozen=True)
class Variant:
    """What a variant's runs gave.

    Attributes:
        label: what it is called.
        card: the paper's row.
        top1: top-1 error in percent, by seed.
        difference: of these errors from the base's, paired by seed; None for the base.
        parameters: number of parameters.
        multiply_adds: multiply-adds for an image of the data.
    """

    label: str
    card: Card
    top1: tuple[float, ...]
    difference: PairedDifference | None
    parameters: int
    multiply_adds: int


def run_ablation(
    config: AblateConfig,
    *,
    watch: Watch,
    tell: Callable[[str], None],
    continued: bool = False,
) -> list[Variant]:
    """Train all runs that are not finished, and write results.json.

    Args:
        config: the ablation.
        watch: opens a progress display for the run of that label; with one process.
        tell: called with a line for each run that ended; with several processes.
        continued: go on in the existing folder; finished runs are kept.

    Raises:
        UserError: the folder exists and `continued` is False, or a run's own reasons.
        SenetError: a run failed.
    """
    # Bad data are found before anything is written.
    data = open_run_data(config.order[0])
    only_classes(data, "senet ablate compares top-1 of classes", TRAIN_BOTH)
    if not continued:
        make_folder(config)
    train_all(
        config, config.order, watch, lambda run: f"{run.out.parent.name} seed {run.seed}", tell
    )
    variants = {label_of(config.ablation, name): cards()[name] for name in config.variants}
    runs = dict(zip(variants, config.runs().values(), strict=True))
    errors = {label: _errors(each) for label, each in runs.items()}
    differences = {
        label: PairedDifference.of(errors[config.base], top1)
        for label, top1 in errors.items()
        if label != config.base
    }
    found = [
        _variant(label, card, runs[label][0], errors[label], differences.get(label))
        for label, card in variants.items()
    ]
    atomic_write(config.out / RESULTS, to_json(config, found))
    return found


def _errors(runs: list[RunConfig]) -> tuple[float, ...]:
    """Top-1 error of each run after its last epoch, in percent."""
    return tuple(100 - read_rows(run.out / "metrics.csv")[-1]["top1"] for run in runs)


def _variant(
    label: str,
    card: Card,
    run: RunConfig,
    top1: tuple[float, ...],
    difference: PairedDifference | None,
) -> Variant:
    checkpoint = open_checkpoint(run.out / "checkpoints" / "last")
    size = checkpoint.preprocessing.image_size
    return Variant(
        label=label,
        card=card,
        top1=top1,
        difference=difference,
        parameters=count_parameters(checkpoint.model),
        multiply_adds=count_multiply_adds(
            checkpoint.model, (checkpoint.preprocessing.channels, size, size)
        ),
    )


def _interval(difference: PairedDifference | None) -> dict[str, float | None] | None:
    """A difference as JSON, whose ends a single seed does not give."""
    if difference is None:
        return None
    ends = {"low": difference.low, "high": difference.high}
    known = {key: None if math.isnan(end) else end for key, end in ends.items()}
    return {"mean": difference.mean, **known}


def to_json(config: AblateConfig, variants: list[Variant]) -> str:
    """The results as JSON, errors in percent."""
    content = {
        "ablation": config.ablation,
        "model": config.model,
        "data": config.data,
        "recipe": config.recipe,
        "epochs": config.training_recipe().epochs,
        "se_options": dict(config.se_options),
        "base": config.base,
        "variants": {
            v.label: {
                "card": v.card.name,
                "top1_error": v.top1,
                "minus_base": _interval(v.difference),
                "parameters": v.parameters,
                "multiply_adds": v.multiply_adds,
                "paper": [{"top1": r.top1, "top5": r.top5} for r in v.card.results],
            }
            for v in variants
        },
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
