"""Our networks against the paper's tables: recomputed as the paper counts, and side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from senet.models import Network, entry
from senet.models.cards import Card, cards
from senet.models.cost import count_parameters, meta_model
from senet.models.inception_resnet_v2 import ResidualMixed
from senet.models.options import SE_OPTIONS
from senet.models.residual import ResidualBlock
from senet.models.shufflenet import ShuffleUnit
from senet.nn.block import SqueezeExcitation
from senet.nn.hooks import without_remark


@dataclass(frozen=True)
class Counts:
    """What we count of a card's network.

    Attributes:
        parameters: parameters.
        multiply_adds: multiply-adds of convolutions and matrix products of one image.
        published_parameters: parameters as the paper counts them.
        published_multiply_adds: multiply-adds likewise.
    """

    parameters: int
    multiply_adds: int
    published_parameters: int
    published_multiply_adds: int


@cache
def recount(name: str) -> Counts:
    """Count the network of the card `name` anew, on the meta device."""
    card = cards()[name]
    model = meta_model(card.network, **card.options)
    products, elementwise = _multiply_adds(model)
    return Counts(
        count_parameters(model), products, published_parameters(model), products + elementwise
    )


def published_parameters(model: nn.Module) -> int:
    """Parameters as the paper counts them: with the two running statistics of each BN channel.

    Caffe keeps those beside the weights.
    """
    statistics = sum(b.numel() for key, b in model.named_buffers() if "running_" in key)
    return count_parameters(model) + statistics


def published_multiply_adds(model: Network) -> int:
    """Multiply-adds as the paper seems to count them, of one image at the model's input size.

    Convolutions and matrix products as `count_multiply_adds`, and one for each position and
    channel of: a squeeze, a scaling, and the addition of a residual, where a scaling and the
    addition behind it count as one (the authors' Caffe layer does both at once). With this the
    ResNets come out to the digits that table 2 gives; with the products alone they do not.
    """
    return sum(_multiply_adds(model))


def _multiply_adds(model: Network) -> tuple[int, int]:
    """Products, and what the paper counts beside them, of a network on the meta device."""
    elementwise = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elementwise
        se = getattr(module, "se", None)
        integration = getattr(module, "integration", "standard")
        if se is not None:
            positions = (inputs[0] if integration == "pre" else output).shape[2:].numel()
            passes = 1 if se.squeeze.method == "none" else 2
            elementwise += se.channels * positions * passes
        if _adds(module) and (se is None or integration != "standard"):
            elementwise += output.numel()

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(getattr(module, "se", None), SqueezeExcitation) or _adds(module)
    ]
    try:
        with torch.no_grad(), without_remark(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, *model.input_size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2, elementwise


def _adds(module: nn.Module) -> bool:
    """Whether a module ends in the addition of a residual."""
    if isinstance(module, ShuffleUnit):
        return module.stride == 1
    return isinstance(module, ResidualBlock | ResidualMixed)


@dataclass(frozen=True)
class PaperRow:
    """A network of the paper and its SE twin, as printed and recounted.

    Attributes:
        network: the plain card's name.
        plain: errors in %, GFLOPs and parameters (millions) as printed, with ours behind each.
        se: the same of the twin.
    """

    network: str
    plain: tuple[str, ...]
    se: tuple[str, ...]


def paper_rows() -> list[PaperRow]:
    """Tables 2 and 3 of the paper from the cards, with our recomputed counts beside them."""
    found = []
    for card in cards().values():
        if card.source in ("table 2", "table 3") and not entry(card.network).se:
            twin = cards()[entry(card.network).twin]
            found.append(PaperRow(card.name, _printed_and_ours(card), _printed_and_ours(twin)))
    return found


def _printed_and_ours(card: Card) -> tuple[str, ...]:
    counts = recount(card.name)
    error = next(result for result in card.results if result.source == card.source)
    return (
        f"{error.top1:.2f}",
        f"{error.top5:.2f}",
        card.paper_gflops or "",
        f"{counts.published_multiply_adds / 1e9:.3f}",
        card.paper_parameters or "",
        f"{counts.published_parameters / 1e6:.1f}",
    )


def paper_differences() -> list[str]:
    """Why a recomputed count of table 2 differs from the printed one."""
    differing = {card.why for card in cards().values() if card.why and card.source == "table 2"}
    return [why for why in sorted(differing) if not why.startswith("As ")]


def stage_counts(
    model: Network, input_size: tuple[int, ...] | None = None
) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of one image, by part: stem, each stage, classifier.

    Args:
        model: a network on the meta device (`meta_model`).
        input_size: (C,H,W) of the image; the network's own by default.
    """
    x = torch.empty(1, *(input_size or model.input_size), device="meta")
    steps: list[tuple[str, Callable[[Tensor], Tensor]]] = [("stem", model.forward_stem)]
    for number in model.stages:
        steps.append((f"stage {number}", partial(model.forward_stage, number)))
    steps.append(("classifier", model.forward_head))
    multiply_adds = {}
    model.eval()
    with torch.no_grad(), without_remark():
        for part, step in steps:
            with FlopCounterMode(display=False) as counter:
                x = step(x)
            multiply_adds[part] = counter.get_total_flops() // 2
    parameters = dict.fromkeys(multiply_adds, 0)
    head = model.head.split(".")[0]
    for name, parameter in model.named_parameters():
        part = next(
            (
                f"stage {number}"
                for number, stage in model.stages.items()
                if any(name.startswith(f"{child}.") for child in stage.children)
            ),
            "classifier" if name.split(".")[0] == head else "stem",
        )
        parameters[part] += parameter.numel()
    return {part: (parameters[part], multiply_adds[part]) for part in multiply_adds}


@dataclass(frozen=True)
class StageCost:
    """What a part of a network costs.

    Attributes:
        part: stem, a stage, or classifier.
        parameters: of the part.
        multiply_adds: of the part, of one image.
        se: parameters and multiply-adds that SE adds; None for a network without SE.
    """

    part: str
    parameters: int
    multiply_adds: int
    se: tuple[int, int] | None


def stage_costs(
    name: str, input_size: tuple[int, ...] | None = None, **options: Any
) -> tuple[StageCost, ...]:
    """Parameters and multiply-adds of a network by stage; with SE, what SE adds to each.

    Args:
        name: a network.
        input_size: (C,H,W) of the image; the network's own by default.
        **options: as for `create_model`.

    Raises:
        UserError: unknown name or option.
    """
    counts = stage_counts(meta_model(name, **options), input_size)
    if not entry(name).se:
        return tuple(StageCost(part, *costs, None) for part, costs in counts.items())
    own = {key: value for key, value in options.items() if key not in SE_OPTIONS}
    if own.get("variant") == "cadene":
        own["variant"] = "caffe"  # cadene is caffe with another ReLU before SE
    plain = stage_counts(meta_model(entry(name).twin, **own), input_size)
    return tuple(
        StageCost(
            part, parameters, products, (parameters - plain[part][0], products - plain[part][1])
        )
        for part, (parameters, products) in counts.items()
    )
