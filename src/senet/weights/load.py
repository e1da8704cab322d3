"""Load weights of any layout into a network, and adapt the network to them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from senet.errors import UserError
from senet.models import Network, SEOptions
from senet.models.options import SE_OPTIONS
from senet.models.resnet import ResNet
from senet.nn.block import SqueezeExcitation
from senet.weights.files import State, contents_of, read_contents
from senet.weights.layouts import Layout, detect
from senet.weights.select import select

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Attributes:
        layout: name of the layout, see `senet.weights.LAYOUTS`.
        loaded: number of tensors that were loaded.
        changed: options of the network that the weights asked for (`variant`, `bias`, `divisor`);
            its `config` holds them now.
        dropped: names of what the network has no place for (the classifier of a network without
            one, an auxiliary classifier, the rest of a larger model, counters, losses).
        kept: names of tensors that the network kept as they were (a new classifier).
        zeroed: names of biases that the weights lack and that are zero now.
        taken: which part of a checkpoint was taken: `state_dict_ema`, `model`, …; "" where the
            weights were all there was.
        prefix: what stood before the network's names, such as `encoder_q.`.
        adapted: name of the first convolution, if it was adapted to another number of channels.
        preprocessing: how the weights want their images; None if the layout does not say.
    """

    layout: str
    loaded: int
    changed: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    adapted: str | None = None
    preprocessing: dict[str, Any] | None = None
    zeroed: tuple[str, ...] = ()
    taken: str = ""
    prefix: str = ""

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors in the layout of {self.layout}"]
        if self.taken:
            parts[0] += f", taken from {self.taken}"
        if self.prefix:
            parts[0] += f", behind {self.prefix}"
        if self.changed:
            parts.append(f"set {', '.join(f'{k}={v}' for k, v in self.changed.items())}")
        said = (("left out", self.dropped), ("kept", self.kept), ("set to zero", self.zeroed))
        for verb, names in said:
            if names:
                parts.append(f"{verb} {_some(names)}")
        if self.adapted:
            parts.append(f"adapted {self.adapted} to the channels")
        return "; ".join(parts)


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Any] | str | PathLike[str],
    *,
    new_head: bool = False,
) -> LoadReport:
    """Load weights of any released layout into a model.

    The layout is found by the names and shapes (`senet.weights.LAYOUTS`). A network of
    `create_model` is adapted in place to the structure that the weights were trained in: strides
    and pooling (`variant`), whether SE blocks have biases (`bias`), and timm's rounding of hidden
    widths (`divisor`). The last two replace parameters, so load before an optimizer is made. A
    first convolution for another number of channels is adapted as timm does it: summed for one
    channel, repeated and rescaled for others. `model.preprocessing` becomes what the layout says.

    Of a checkpoint an average of the weights is taken before the weights themselves. The network
    may be part of a larger model there (`module.`, `model.`, `backbone.`, MoCo's `encoder_q.`, …):
    the part whose names fit is taken. Counters of other tools and losses' weights are left out.

    Args:
        model: the model, changed in place; any module other than a network of this package must
            have the very names and shapes of the weights.
        weights: state dict or checkpoint, or a source as in `senet.weights.read_state_dict`.
        new_head: keep the model's last layer as it is if the weights' has another number of
            classes or another form, or if they have none.

    Returns:
        What was loaded, dropped and changed.

    Raises:
        UserError: names or shapes differ (the message names the first ones); the model is
            unchanged then.
    """
    contents = contents_of(weights) if isinstance(weights, Mapping) else read_contents(weights)
    selected = select(contents.state, model)
    dropped = (*contents.left, *selected.dropped)
    if not isinstance(model, Network) or not hasattr(model, "config"):
        state = selected.state
        _check({k: v.shape for k, v in model.state_dict().items()}, state, "its own")
        model.load_state_dict(state)
        report = LoadReport("its own", len(state), dropped=dropped)
    else:
        report = _Loading(model, selected.state, contents.description, new_head).run()
        report = replace(report, dropped=(*dropped, *report.dropped))
    return replace(report, taken=contents.taken, prefix=selected.prefix)


class _Loading:
    """One call of `load_weights`: everything is planned and checked before the model changes."""

    def __init__(
        self, model: Network, state: State, description: dict[str, Any], new_head: bool
    ) -> None:
        self.model = model
        self.layout: Layout = detect(state)
        self.description = description
        self.new_head = new_head
        self.state = self.layout.decode(state, model)
        self.shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        self.changed: dict[str, Any] = {}
        self.dropped: list[str] = []
        self.kept: list[str] = []
        self.zeroed: list[str] = []
        self.adapted: str | None = None

    def run(self) -> LoadReport:
        self._check_description()
        self._plan_variant()
        self._plan_gates()
        self._plan_stem()
        self._plan_heads()
        self._plan_counters()
        _check(self.shapes, self.state, self.layout.name)
        self._adapt_model()
        self.model.load_state_dict(self.state, strict=False)
        if self.changed:
            options = {**self.model.config["options"], **self.changed}
            self.model.config = {**self.model.config, "options": options}
        preprocessing = self.description.get("preprocessing") or (
            None if self.description else self.layout.preprocessing(self.model)
        )
        if preprocessing is not None:
            self.model.preprocessing = preprocessing
        return LoadReport(
            self.layout.name,
            len(self.state),
            self.changed,
            tuple(self.dropped),
            tuple(self.kept),
            self.adapted,
            preprocessing,
            tuple(self.zeroed),
        )

    def _check_description(self) -> None:
        """Options that no name or shape shows, where the file tells them."""
        if not self.description:
            return
        theirs = self.description["model"]["options"]
        for option in ("squeeze", "gate", "integration"):
            default = getattr(SEOptions(), option)
            wanted, given = theirs.get(option, default), self._option(option, default)
            if wanted != given:
                raise UserError(
                    f"the weights are of a network with {option}={wanted!r}, the model has "
                    f"{given!r}: make it with {option}={wanted!r}"
                )

    def _option(self, name: str, default: Any) -> Any:
        return self.model.config["options"].get(name, default)

    def _plan_variant(self) -> None:
        """Which `variant` the weights were trained in, if the network has any."""
        if not isinstance(self.model, ResNet) or self.model.maxpool is None:
            return
        variant = self.layout.variant
        if self.description:
            variant = self.description["model"]["options"].get("variant", "torch")
        elif variant == "caffe" and self.model.config["name"] in ("se_resnet18", "se_resnet34"):
            # Only pretrainedmodels' successors released these, with their own basic block.
            variant = "cadene"
        if variant is not None and variant != self._option("variant", "torch"):
            self.changed["variant"] = variant

    def _plan_gates(self) -> None:
        """Whether SE blocks have biases, and their hidden widths."""
        blocks = self._blocks()
        widths = {
            name: self.state[f"{name}.fc1.weight"].shape[0]
            for name in blocks
            if f"{name}.fc1.weight" in self.state
        }
        if not blocks or len(widths) < len(blocks):
            return
        bias = any(f"{name}.fc1.bias" in self.state for name in blocks)
        own = {k: v for k, v in self.model.config["options"].items() if k in SE_OPTIONS}
        if bias != self._option("bias", True):
            self.changed["bias"] = own["bias"] = bias
        if any(blocks[name].hidden != width for name, width in widths.items()):
            for divisor in (1, 8):
                options = SEOptions(**{**own, "divisor": divisor})
                if all(options.hidden(blocks[n].channels) == w for n, w in widths.items()):
                    self.changed["divisor"] = divisor
                    break
        if not self.changed.keys() & {"bias", "divisor"}:
            return
        options = SEOptions(**{**own, **_only(self.changed, "bias", "divisor")})
        for name, block in blocks.items():
            channels, hidden = block.channels, options.hidden(block.channels)
            for key in ("fc1.bias", "fc2.bias"):
                self.shapes.pop(f"{name}.{key}", None)
            self.shapes[f"{name}.fc1.weight"] = torch.Size((hidden, channels))
            self.shapes[f"{name}.fc2.weight"] = torch.Size((channels, hidden))
            if bias:
                self.shapes[f"{name}.fc1.bias"] = torch.Size((hidden,))
                self.shapes[f"{name}.fc2.bias"] = torch.Size((channels,))

    def _blocks(self) -> dict[str, SqueezeExcitation]:
        modules = self.model.named_modules()
        return {name: m for name, m in modules if isinstance(m, SqueezeExcitation)}

    def _plan_stem(self) -> None:
        """Adapt the first convolution to the images' channels."""
        stem = next(n for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d))
        key = f"{stem}.weight"
        theirs, ours = self.state.get(key), self.shapes.get(key)
        if theirs is None or ours is None or theirs.ndim != 4 or theirs.shape == ours:
            return
        if (theirs.shape[0], *theirs.shape[2:]) == (ours[0], *ours[2:]):
            self.state[key] = adapt_channels(theirs, ours[1])
            self.adapted = key

    def _plan_heads(self) -> None:
        """Classifiers that only one side has, of another form, or for other classes."""
        for head in (self.model.head, "AuxLogits.fc"):
            self._plan_head(head)
        if self.model.config["num_classes"] == 0:
            self._drop(self.model.head.split(".")[0] + ".")
        if not any(key.startswith("AuxLogits.") for key in self.shapes):
            self._drop("AuxLogits.")

    def _plan_head(self, head: str) -> None:
        ours = {key: shape for key, shape in self.shapes.items() if key.startswith(f"{head}.")}
        theirs = {k: v.shape for k, v in self.state.items() if k.startswith(f"{head}.")}
        weight, bias = f"{head}.weight", f"{head}.bias"
        if not ours or theirs == ours:
            return
        if weight in theirs and theirs[weight][1:] != ours[weight][1:]:
            return  # another network's: `_check` says so
        if theirs.keys() == {weight} and theirs[weight] == ours[weight]:
            self.state[bias] = self.state[weight].new_zeros(ours[bias])
            self.zeroed.append(bias)
            return
        others = [k for k in self.shapes if k not in ours and not k.endswith(_COUNTER)]
        if not theirs and any(key not in self.state for key in others):
            return  # it is not the head alone that they lack
        if not self.new_head:
            raise UserError(self._head_differs(head, theirs, ours))
        for key in theirs:
            del self.state[key]
            if key not in ours:
                self.dropped.append(key)
        for key in ours:
            del self.shapes[key]
            self.kept.append(key)

    def _head_differs(
        self, head: str, theirs: Mapping[str, torch.Size], ours: Mapping[str, torch.Size]
    ) -> str:
        keep = "keep its own new layer with load_weights(…, new_head=True)"
        weight = f"{head}.weight"
        if weight in theirs:
            classes = theirs[weight][0]
            return (
                f"the weights' {head} has {classes} classes and the model's {ours[weight][0]}: "
                f"make the model with num_classes={classes}, or {keep}"
            )
        if theirs:
            return f"the weights' {head} has another form ({_some(list(theirs))}): {keep}"
        return f"the weights have no last layer ({head}) for the model: {keep}"

    def _drop(self, prefix: str) -> None:
        for key in [key for key in self.state if key.startswith(prefix)]:
            self.dropped.append(key)
            del self.state[key]

    def _plan_counters(self) -> None:
        """Files older than PyTorch 0.4.1 lack batch norms' counters; nothing depends on them."""
        for key in list(self.shapes):
            if key.endswith(_COUNTER) and key not in self.state:
                del self.shapes[key]

    def _adapt_model(self) -> None:
        if "variant" in self.changed and isinstance(self.model, ResNet):
            self.model.set_variant(self.changed["variant"])
        if not self.changed.keys() & {"bias", "divisor"}:
            return
        for name, block in self._blocks().items():
            bias = f"{name}.fc1.bias" in self.shapes
            block.hidden = self.shapes[f"{name}.fc1.weight"][0]
            block.fc1 = _linear_like(block.fc1, block.channels, block.hidden, bias)
            block.fc2 = _linear_like(block.fc2, block.hidden, block.channels, bias)


def _linear_like(layer: nn.Linear, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    weight = layer.weight
    new = nn.Linear(inputs, outputs, bias, device=weight.device, dtype=weight.dtype)
    return new.requires_grad_(weight.requires_grad).train(layer.training)


def _only(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """The first convolution's weight (O,I,h,w) for images of another number of channels.

    For one channel the sum over I, so that a grey image gives what it gave as three equal ones.
    For others the I slices in turn, scaled by I / channels, so that outputs keep their size.

    Returns:
        (O, channels, h, w), dtype of `weight`.
    """
    given = weight.shape[1]
    wide = weight.float()
    if channels == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    repeated = wide.repeat(1, math.ceil(channels / given), 1, 1)[:, :channels]
    return (repeated * (given / channels)).to(weight.dtype)


def _check(shapes: Mapping[str, torch.Size], state: State, layout: str) -> None:
    problems = [f"{key} is missing" for key in shapes if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in shapes]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(shape)}"
        for key, shape in shapes.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        raise UserError(
            f"weights do not fit the model (read in the layout of {layout}): {_some(problems)}"
        )


def _some(items: list[str] | tuple[str, ...]) -> str:
    """The first three, and how many more."""
    more = f" (and {len(items) - 3} more)" if len(items) > 3 else ""
    return f"{'; '.join(items[:3])}{more}"
