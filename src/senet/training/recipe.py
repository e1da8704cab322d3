"""How a network is trained: every number of it in one validated, typed object."""

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from senet.data import Augmentation
from senet.errors import UserError

Schedule = Literal["step", "cosine", "one_cycle", "constant"]
Normalisation = Literal["mean_std", "mean"]
MixedPrecision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train, by stochastic gradient descent with momentum.

    Attributes:
        name: where it comes from: a key of `RECIPES`, or a name of your own.
        epochs: passes over the training set.
        batch_size: images a step, over all processes together.
        lr: highest learning rate. Not scaled with `batch_size`.
        schedule: what happens to the learning rate after the warm-up, step by step: "step"
            multiplies it by `step_gamma` at each of `step_epochs`; "cosine" lets it fall to 0;
            "one_cycle" lets it rise during `warmup_epochs` and fall to 0, both as half a
            cosine; "constant" keeps it.
        warmup_epochs: epochs in which the learning rate rises, linearly from a hundredth; may be
            a fraction. Must be positive for "one_cycle".
        step_epochs: of the "step" schedule only.
        step_gamma: of the "step" schedule only.
        momentum: of SGD.
        nesterov: Nesterov's momentum instead of the classical one.
        weight_decay: L2 penalty, in SGD's gradient (coupled).
        decay_norm_and_bias: whether it also acts on the weights of normalisation layers and on
            all biases (every parameter with one dimension).
        label_smoothing: share of the target spread over all classes, in [0, 1).
        ema_decay: keep an exponential moving average of weights and BN statistics with this
            decay a step (less in the first steps: min(decay, (1 + n) / (10 + n))), and judge and
            save that one; None for none.
        grad_clip: largest L2 norm of the whole gradient; None for no limit.
        mixed_precision: "no" (float32), "bf16" or "fp16" (CUDA only; with a loss scaler).
        normalisation: "mean_std" as the data set gives it; "mean" subtracts the channel means
            only. A first convolution without bias that is followed by BN gives the same network
            function for either up to eps, where the channels share one std.
        augmentation: what is done to training images, see `senet.data.Augmentation`.

    Raises:
        UserError: a value outside its range; the message names field, value and remedy.
    """

    name: str = "custom"
    epochs: int
    batch_size: int
    lr: float
    schedule: Schedule
    warmup_epochs: float = 0.0
    step_epochs: tuple[float, ...] = ()
    step_gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = True
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    grad_clip: float | None = None
    mixed_precision: MixedPrecision = "no"
    normalisation: Normalisation = "mean_std"
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_epochs", tuple(self.step_epochs))
        self._integer("epochs", 1)
        self._integer("batch_size", 1)
        self._number("lr", above=0, remedy="0.1 suits SGD at batch 128 or 256")
        self._number("warmup_epochs", least=0)
        self._number("step_gamma", above=0, most=1)
        self._number("momentum", least=0, below=1)
        self._number("weight_decay", least=0)
        self._number("label_smoothing", least=0, below=1)
        if self.ema_decay is not None:
            self._number("ema_decay", above=0, below=1, remedy="leave it out for no EMA")
        if self.grad_clip is not None:
            self._number("grad_clip", above=0, remedy="leave it out for no clipping")
        self._choice("schedule", get_args(Schedule))
        self._choice("mixed_precision", get_args(MixedPrecision))
        self._choice("normalisation", get_args(Normalisation))
        if self.nesterov and not self.momentum:
            raise UserError("nesterov needs momentum above 0, got 0; give a momentum such as 0.9")
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs must be less than epochs ({self.epochs}), "
                f"got {self.warmup_epochs}; shorten the warm-up"
            )
        if self.schedule == "one_cycle" and not self.warmup_epochs:
            raise UserError("warmup_epochs must be above 0 for one_cycle (its rising part), got 0")
        if self.schedule == "step":
            self._check_steps()
        elif self.step_epochs:
            raise UserError(
                f"step_epochs belongs to the step schedule, got {self.step_epochs} with "
                f"{self.schedule}; leave it out or use schedule='step'"
            )

    def _check_steps(self) -> None:
        steps = self.step_epochs
        rising = all(a < b for a, b in itertools.pairwise(steps))
        if not steps or not rising or steps[0] <= self.warmup_epochs or steps[-1] >= self.epochs:
            raise UserError(
                "step_epochs must rise strictly and lie between warmup_epochs "
                f"({self.warmup_epochs}) and epochs ({self.epochs}), got {steps}"
            )

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")

    def _number(
        self,
        name: str,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        below: float = math.inf,
        most: float = math.inf,
        remedy: str = "",
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and least <= value <= most and above < value < below:
            return
        limits = {"at least": least, "above": above, "below": below, "at most": most}
        said = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
        hint = f"; {remedy}" if remedy else ""
        raise UserError(f"{name} must be a number {' and '.join(said)}, got {value!r}{hint}")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise UserError(
                f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as TOML can hold them: lists for tuples, nothing for None."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`.

        Raises:
            UserError: an unknown field, or a value outside its range.
        """
        known = {f.name for f in fields(cls)}
        _refuse_unknown("recipe", values, known)
        missing = {"epochs", "batch_size", "lr", "schedule"} - values.keys()
        if missing:
            raise UserError(f"the recipe lacks {', '.join(sorted(missing))}")
        given = dict(values)
        if "augmentation" in given:
            given["augmentation"] = _augmentation(given["augmentation"], Augmentation())
        return cls(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _refuse_unknown(what: str, values: Mapping[str, Any], known: set[str]) -> None:
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown {what} field {name!r}; {hint}")


def _augmentation(value: Augmentation | Mapping[str, Any], base: Augmentation) -> Augmentation:
    if isinstance(value, Augmentation):
        return value
    _refuse_unknown("augmentation", value, {f.name for f in fields(Augmentation)})
    return replace(base, **dict[str, Any](value))


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # Short enough for the demo: one cycle up to lr 0.2, batch 128, eight epochs, as measured
        # for ResNet-8 on 10,000 images of Fashion-MNIST (docs/results.md).
        "quick": Recipe(
            name="quick",
            epochs=8,
            batch_size=128,
            lr=0.2,
            schedule="one_cycle",
            warmup_epochs=2,
            nesterov=True,
            weight_decay=5e-4,
            decay_norm_and_bias=False,
            augmentation=Augmentation(crop="padded", padding=2, flip=True),
        ),
        # The usual CIFAR recipe, of Wide Residual Networks (arXiv 1605.07146, section 3): SGD
        # with Nesterov's momentum, lr 0.1 times 0.2 at epochs 60, 120 and 160 of 200, weight
        # decay 5e-4 on every parameter, batch 128, padding 4 and random crop, flip.
        "cifar": Recipe(
            name="cifar",
            epochs=200,
            batch_size=128,
            lr=0.1,
            schedule="step",
            step_epochs=(60, 120, 160),
            step_gamma=0.2,
            nesterov=True,
            weight_decay=5e-4,
            augmentation=Augmentation(crop="padded", padding=4, flip=True),
        ),
        # The paper's section 5: batch 1024, lr 0.6 divided by 10 every 30 of 100 epochs, momentum
        # 0.9, random-size crop with aspect ratio, flip, mean subtraction, He initialisation
        # (every network here starts so). It does not state the weight decay: 1e-4 on every
        # parameter is that of the ResNets it retrains (arXiv 1512.03385, section 3.4); area
        # and aspect ratio of the crop are those of its released models.
        "imagenet-paper": Recipe(
            name="imagenet-paper",
            epochs=100,
            batch_size=1024,
            lr=0.6,
            schedule="step",
            step_epochs=(30, 60, 90),
            step_gamma=0.1,
            weight_decay=1e-4,
            normalisation="mean",
            augmentation=Augmentation(
                crop="random_resized", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=True
            ),
        ),
        # The tricks that came after: cosine, five epochs of warm-up, label smoothing 0.1, mixup
        # 0.2 and no decay of BN and biases (arXiv 1812.01187, sections 3.1 and 5: lr 0.1 for each
        # 256 images, 200 epochs with mixup), EMA 0.9999, RandAugment and a smaller weight decay
        # to balance them (arXiv 2103.07579, section 4.2).
        "imagenet-modern": Recipe(
            name="imagenet-modern",
            epochs=200,
            batch_size=1024,
            lr=0.4,
            schedule="cosine",
            warmup_epochs=5,
            nesterov=True,
            weight_decay=4e-5,
            decay_norm_and_bias=False,
            label_smoothing=0.1,
            ema_decay=0.9999,
            augmentation=Augmentation(
                crop="random_resized",
                scale=(0.08, 1.0),
                ratio=(3 / 4, 4 / 3),
                flip=True,
                randaugment=(2, 10),
                mixup=0.2,
            ),
        ),
    }
)


def scaled_lr(recipe: Recipe, batch_size: int) -> float:
    """The linear scaling rule: the recipe's learning rate times the ratio of batch sizes.

    Meant with a warm-up (arXiv 1706.02677, section 2.1: k times the images, k times the rate,
    five epochs of warm-up).

    Args:
        recipe: its `lr` belongs to its `batch_size`.
        batch_size: images a step of the run, over all processes.
    """
    return recipe.lr * batch_size / recipe.batch_size


def get_recipe(name: str, **overrides: Any) -> Recipe:
    """A named recipe, with some fields changed.

    Where `epochs` is changed alone, warm-up and steps keep their share of the training: "cifar"
    with 20 epochs divides the learning rate at epochs 6, 12 and 16.

    Args:
        name: one of `RECIPES`.
        **overrides: fields of `Recipe`; `augmentation` may be a mapping of the fields of
            `Augmentation` that change.

    Raises:
        UserError: unknown recipe or field (the closest is named), or a value out of range.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(RECIPES)}"
        raise UserError(f"unknown recipe {name!r}; {hint}")
    recipe = RECIPES[name]
    _refuse_unknown("recipe", overrides, {f.name for f in fields(Recipe)})
    changes = dict(overrides)
    if "augmentation" in changes:
        changes["augmentation"] = _augmentation(changes["augmentation"], recipe.augmentation)
    if changes.get("schedule", recipe.schedule) != "step":
        changes.setdefault("step_epochs", ())
    epochs = changes.get("epochs", recipe.epochs)
    if isinstance(epochs, int) and epochs > 0:
        share = epochs / recipe.epochs
        changes.setdefault("warmup_epochs", recipe.warmup_epochs * share)
        changes.setdefault("step_epochs", tuple(step * share for step in recipe.step_epochs))
    return replace(recipe, **changes)
