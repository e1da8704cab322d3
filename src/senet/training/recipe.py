"""How a network is trained: every number of it in one validated, typed object."""

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from senet.data import Augmentation
from senet.errors import UserError
from senet.support.fields import misfit
from senet.training.optimizer_names import arguments_of

Schedule = Literal["step", "cosine", "one_cycle", "linear", "exponential", "constant"]
Normalisation = Literal["mean_std", "mean", "measured"]
MixedPrecision = Literal["no", "bf16", "fp16"]
ClassWeights = Literal["none", "balanced"]
Sampler = Literal["shuffled", "balanced"]
Loss = Literal["auto", "cross_entropy", "bce", "mse", "l1"]
# Where a field stands in `senet train --help` and `senet recipes`.
LENGTH, OPTIMIZER, REGULARISATION, INPUT = (
    {"group": name} for name in ("Length", "Optimizer", "Regularisation", "Input")
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train. Each field is a flag of `senet train`.

    Attributes:
        name: where it comes from: a key of `RECIPES`, or a name of your own.
        epochs: passes over the training images.
        batch_size: images a step, over all processes together.
        patience: end after this many epochs in a row without a better result on the validation
            images; None: never before `epochs`.
        mixed_precision: lower precision of the forward pass: "no" (float32), "bf16" or "fp16" (CUDA
            only; with a loss scaler).
        optimizer: by its name in PyTorch ("sgd", "adamw", "adam", "nadam", "radam", "adamax",
            "rmsprop") or, where timm is installed, in `timm.optim` ("lamb", "lion", …).
        lr: highest learning rate. Not scaled with `batch_size`.
        schedule: what happens to the learning rate after the warm-up, step by step: "step"
            multiplies it by `step_gamma` at each of `step_epochs`; "exponential" each epoch;
            "cosine" and "linear" let it fall to 0; "one_cycle" lets it rise during `warmup_epochs`
            and fall to 0, both as half a cosine; "constant" keeps it.
        warmup_epochs: epochs in which the learning rate rises, linearly from a hundredth; may be
            a fraction. Must be positive for "one_cycle".
        step_epochs: of the "step" schedule only.
        step_gamma: of the "step" and the "exponential" schedule.
        momentum: of SGD and rmsprop; of Adam's family the first beta.
        beta2: of Adam's family only, the second beta; None: the optimizer's own.
        nesterov: Nesterov's momentum instead of the classical one, of SGD.
        layer_decay: learning rate of each layer over that of the next one towards the head
            (arXiv 2106.08254, section A), see `senet.training.layers`; None: the same for all.
        new_layer_lr: factor of the learning rate for layers that the weights to start from did not
            have: a fresh classifier, SE blocks that were put in.
        grad_clip: largest L2 norm of the whole gradient; None for no limit.
        ema_decay: keep an exponential moving average of weights and BN statistics with this
            decay a step (less in the first steps: min(decay, (1 + n) / (10 + n))), and judge and
            save that one; None for none.
        weight_decay: L2 penalty as the optimizer takes it: in the gradient (SGD, Adam), or beside
            it (AdamW, LAMB).
        decay_norm_and_bias: whether it also acts on the weights of normalisation layers and on
            all biases (every parameter with one dimension).
        loss: "auto" is the task's usual: "cross_entropy" of classes, "bce" (binary cross-entropy of
            each label) of several labels, "mse" of numbers, whose other one is "l1".
        label_smoothing: share of the target spread over all classes, of labels over yes and no, in
            [0, 1).
        class_weights: "balanced" weighs each image's loss by images over (classes times images of
            its class), so that rare classes count as much as frequent ones; of several labels an
            image that has it by those without over those with it; "none".
        sampler: "shuffled": each image once an epoch; "balanced": as many images, but each class
            as often as another, so that images of rare classes come several times.
        drop_path: probability that the last residual branch is left out for an image (stochastic
            depth, arXiv 1603.09382), less in proportion for those before.
        normalisation: "mean_std" as the data set gives it, and measured where it gives none (images
            that are not 8-bit colours); "measured" on its training images (see
            `senet stats`); "mean" subtracts the channel means only. A first convolution without
            bias that is followed by BN gives the same network function with the mean alone up to
            eps, where the channels share one std.
        augmentation: what is done to training images, see `senet.data.Augmentation`.

    Raises:
        UserError: a value outside its range; the message names field, value and remedy.
    """

    name: str = "custom"
    epochs: int = field(metadata=LENGTH)
    batch_size: int = field(metadata=LENGTH)
    patience: int | None = field(default=None, metadata=LENGTH)
    mixed_precision: MixedPrecision = field(default="no", metadata=LENGTH)
    optimizer: str = field(default="sgd", metadata=OPTIMIZER)
    lr: float = field(metadata=OPTIMIZER)
    schedule: Schedule = field(metadata=OPTIMIZER)
    warmup_epochs: float = field(default=0.0, metadata=OPTIMIZER)
    step_epochs: tuple[float, ...] = field(default=(), metadata=OPTIMIZER)
    step_gamma: float = field(default=0.1, metadata=OPTIMIZER)
    momentum: float = field(default=0.9, metadata=OPTIMIZER)
    beta2: float | None = field(default=None, metadata=OPTIMIZER)
    nesterov: bool = field(default=False, metadata=OPTIMIZER)
    layer_decay: float | None = field(default=None, metadata=OPTIMIZER)
    new_layer_lr: float = field(default=1.0, metadata=OPTIMIZER)
    grad_clip: float | None = field(default=None, metadata=OPTIMIZER)
    ema_decay: float | None = field(default=None, metadata=REGULARISATION | {"alias": "ema"})
    weight_decay: float = field(default=0.0, metadata=REGULARISATION)
    decay_norm_and_bias: bool = field(default=True, metadata=REGULARISATION)
    loss: Loss = field(default="auto", metadata=REGULARISATION)
    label_smoothing: float = field(default=0.0, metadata=REGULARISATION)
    class_weights: ClassWeights = field(default="none", metadata=REGULARISATION)
    sampler: Sampler = field(default="shuffled", metadata=REGULARISATION)
    drop_path: float = field(default=0.0, metadata=REGULARISATION)
    normalisation: Normalisation = field(default="mean_std", metadata=INPUT)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for each in fields(self):
            # Of a number and of a choice the limits are told as well, below.
            if each.type in (bool, str, Augmentation) or get_origin(each.type) is tuple:
                _check_type(each, getattr(self, each.name))
        object.__setattr__(self, "step_epochs", tuple(self.step_epochs))
        self._integer("epochs", 1)
        self._integer("batch_size", 1)
        if self.patience is not None:
            self._integer("patience", 1)
        self._number("lr", above=0, remedy="0.1 suits SGD at batch 128 or 256, 1e-3 AdamW")
        self._number("warmup_epochs", least=0)
        self._number("step_gamma", above=0, most=1)
        self._number("momentum", least=0, below=1)
        self._number("new_layer_lr", above=0)
        self._number("weight_decay", least=0)
        self._number("label_smoothing", least=0, below=1)
        self._number("drop_path", least=0, below=1)
        if self.ema_decay is not None:
            self._number("ema_decay", above=0, below=1, remedy="leave it out for no EMA")
        if self.grad_clip is not None:
            self._number("grad_clip", above=0, remedy="leave it out for no clipping")
        if self.layer_decay is not None:
            self._number("layer_decay", above=0, most=1, remedy="leave it out for one rate")
        if self.beta2 is not None:
            self._number("beta2", above=0, below=1)
        for name, kinds in (
            ("schedule", Schedule),
            ("mixed_precision", MixedPrecision),
            ("class_weights", ClassWeights),
            ("loss", Loss),
            ("sampler", Sampler),
            ("normalisation", Normalisation),
        ):
            self._choice(name, get_args(kinds))
        if self.nesterov and not self.momentum:
            raise UserError("nesterov needs momentum above 0, got 0; give a momentum such as 0.9")
        self._check_optimizer()
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

    def _check_optimizer(self) -> None:
        takes = arguments_of(self.optimizer)
        if self.nesterov and "nesterov" not in takes:
            raise UserError(f"nesterov is of sgd, not of {self.optimizer}: leave it out")
        if self.beta2 is not None and "betas" not in takes:
            raise UserError(f"beta2 is of Adam's family, not of {self.optimizer}: leave it out")

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


def _check_type(field: "Field[Any]", value: object) -> None:
    if (wanted := misfit(value, field.type)) is not None:
        raise UserError(f"{field.name} must be {wanted}, got {value!r}")


def _augmentation(value: object, base: Augmentation) -> Augmentation:
    if isinstance(value, Augmentation):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"augmentation must be a table such as {{flip = true}}, got {value!r}")
    _refuse_unknown("augmentation", value, {f.name for f in fields(Augmentation)})
    try:
        return replace(base, **dict[str, Any](value))
    except ValueError as error:
        raise UserError(str(error)) from error


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
        # A network that knows something already (--init, --weights): AdamW (arXiv 1711.05101)
        # with a low rate, ten times that for what is new (discriminative rates, arXiv 1801.06146,
        # section 3.2), a short warm-up and cosine, an average of the weights, mild crops. Rate and
        # crops were tried on small images alone (docs/training.md).
        "finetune": Recipe(
            name="finetune",
            epochs=10,
            batch_size=64,
            optimizer="adamw",
            lr=1e-3,
            schedule="cosine",
            warmup_epochs=1,
            new_layer_lr=10,
            grad_clip=1.0,
            ema_decay=0.998,
            weight_decay=0.02,
            decay_norm_and_bias=False,
            label_smoothing=0.1,
            augmentation=Augmentation(crop="random_resized", scale=(0.6, 1.0), flip=True),
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
    """The recipe's learning rate for another size of batch.

    SGD: times the ratio of the sizes (linear scaling, arXiv 1706.02677, section 2.1; meant with a
    warm-up). Optimizers that divide by the gradient's size, Adam's family: times its square root
    (arXiv 2205.10287, definition 3.3).

    Args:
        recipe: its `lr` belongs to its `batch_size`.
        batch_size: images a step of the run, over all processes.
    """
    ratio = batch_size / recipe.batch_size
    return recipe.lr * (math.sqrt(ratio) if "betas" in arguments_of(recipe.optimizer) else ratio)


_FEW_STEPS = 8  # of an epoch; with fewer, a batch for each of so many is taken
_LEAST_BATCH = 8  # with fewer images, the statistics of batch norm say little


def fitting_batch(recipe: Recipe, images: int, multiple: int) -> int:
    """Images a step for a data set: the recipe's, or fewer where an epoch had few of these.

    Args:
        recipe: its `batch_size` is the most.
        images: of the training set.
        multiple: the result is a multiple of this, such as the number of processes.
    """
    if images >= _FEW_STEPS * recipe.batch_size:
        return recipe.batch_size
    share = max(images // _FEW_STEPS, min(_LEAST_BATCH, images))
    power = 2 ** (share.bit_length() - 1)
    return min(max(power // multiple, 1) * multiple, recipe.batch_size)


def get_recipe(name: str, **overrides: Any) -> Recipe:
    """A named recipe, with some fields changed, see `changed`.

    Args:
        name: one of `RECIPES`.
        **overrides: fields of `Recipe` or of `Augmentation`.

    Raises:
        UserError: unknown recipe or field (the closest is named), or a value out of range.
    """
    if not isinstance(name, str):
        raise UserError(f"name must be that of a recipe, got {name!r}")
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(RECIPES)}"
        raise UserError(f"unknown recipe {name!r}; {hint}")
    return changed(RECIPES[name], **overrides)


def changed(recipe: Recipe, **overrides: Any) -> Recipe:
    """A recipe with some fields changed.

    Where `epochs` is changed alone, warm-up and steps keep their share of the training: "cifar"
    with 20 epochs divides the learning rate at epochs 6, 12 and 16. Another optimizer, schedule or
    crop leaves behind what belongs to the former one alone.

    Args:
        recipe: where the other fields come from.
        **overrides: fields of `Recipe` or of `Augmentation`; `augmentation` itself may be a
            mapping of the fields that change.

    Raises:
        UserError: unknown field (the closest is named), or a value out of range.
    """
    of_images = {f.name for f in fields(Augmentation)}
    _refuse_unknown("recipe", overrides, {f.name for f in fields(Recipe)} | of_images)
    changes = {key: value for key, value in overrides.items() if key not in of_images}
    images = {key: value for key, value in overrides.items() if key in of_images}
    base = _augmentation(changes.pop("augmentation", {}), recipe.augmentation)
    if images:
        if (crop := images.get("crop", base.crop)) != base.crop:
            plain = Augmentation()
            left: dict[str, Any] = {"padding": 4 if crop == "padded" else 0}
            left |= {"scale": plain.scale, "ratio": plain.ratio} if crop != "random_resized" else {}
            images = left | images
        base = _augmentation(images, base)
    changes["augmentation"] = base
    if changes.get("schedule", recipe.schedule) != "step":
        changes.setdefault("step_epochs", ())
    if changes.get("optimizer", recipe.optimizer) != recipe.optimizer:
        takes, took = arguments_of(changes["optimizer"]), arguments_of(recipe.optimizer)
        if "lr" not in changes and ("betas" in takes) != ("betas" in took):
            raise UserError(
                f"optimizer {changes['optimizer']} needs a learning rate of its own, {recipe.lr:g} "
                f"is for {recipe.optimizer}: give lr too, such as "
                f"{'0.001' if 'betas' in takes else '0.1'}"
            )
        if "nesterov" not in takes:
            changes.setdefault("nesterov", False)
        if "betas" not in takes:
            changes.setdefault("beta2", None)
    epochs = changes.get("epochs", recipe.epochs)
    if isinstance(epochs, int) and epochs > 0:
        share = epochs / recipe.epochs
        changes.setdefault("warmup_epochs", recipe.warmup_epochs * share)
        changes.setdefault("step_epochs", tuple(step * share for step in recipe.step_epochs))
    return replace(recipe, **changes)
