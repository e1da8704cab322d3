"""SE blocks of every timm and torchvision network: found by what they compute, and counted apart.

    python scripts/anatomy_table.py [--only PATTERN] [--out docs/anatomy_table.md]

The count that is compared with is made from the libraries' own classes: modules of these types that
run in the forward pass. Each network is built and run on the meta device at its own input size, so
no memory is needed; one that cannot run there is run on the CPU with its smallest input. A network
with SE then runs in float64 with its smallest input: what `senet.record_gates` records is compared
with output ÷ input of the libraries' modules, channel by channel. What was found is kept in a file
beside the page (`--results`), from which an interrupted run goes on. Takes about an hour on two
cores; not a part of the test suite.
"""

import argparse
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from resumable import rows_of
from timm.layers.cbam import ChannelAttn
from timm.layers.eca import EcaModule
from timm.layers.gather_excite import GatherExcite
from timm.layers.global_context import GlobalContext
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule, SqueezeExciteCl
from timm.models import _efficientnet_blocks, hgnet
from timm.models import senet as timm_senet
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from senet.anatomy import Anatomy, anatomy
from senet.gates.record import record_gates

SE_CLASSES = (
    SEModule,
    EffectiveSEModule,
    SqueezeExciteCl,
    EcaModule,
    ChannelAttn,
    _efficientnet_blocks.SqueezeExcite,
    hgnet.EseModule,
    timm_senet.SEModule,
    SqueezeExcitation,
)
# Why more was found than these classes say.
REASONS = {
    "timm:resnest50d_1s4x24d": "split attention with a single branch is SE, without its class",
    "torchvision:lraspp_mobilenet_v3_large": "the head scales its map by gates made of the pooled "
    "backbone: SE, without a class",
}


def is_se(module: nn.Module) -> bool:
    """Whether the library itself calls the module SE, or a kin of it with a factor per channel."""
    if isinstance(module, GlobalContext):
        return module.mlp_scale is not None  # else its context is added
    if isinstance(module, GatherExcite):
        return module.extent == 0  # else each position has gates of its surroundings
    return isinstance(module, SE_CLASSES)


def examined(name: str) -> dict[str, Any]:
    """Both counts of a network, and where they differ."""
    library, _, short = name.partition(":")

    def build(**options: Any) -> nn.Module:
        if library == "timm":
            return timm.create_model(short, **options)
        extra = {"weights_backbone": None} if "backbone" in _arguments(short) else {}
        return torchvision.models.get_model(short, weights=None, **extra)

    began = time.perf_counter()
    try:
        with torch.device("meta"):
            model = build().eval()
        seen, called = _seen(model, short, "meta")
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        why = str(error).splitlines()[0][:120]
        try:
            model = build().eval()
            seen, called = _seen(model, short, "cpu")
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as second:
            return {"name": name, "failed": f"{why}; {str(second).splitlines()[0][:120]}"}
    own = [key for key, module in model.named_modules() if is_se(module) and key in called]
    found = list(seen.excitations)
    both = [key for key in own if key in found]
    return {
        "name": name,
        "family": type(model).__name__,
        "classes": dict(Counter(type(model.get_submodule(key)).__name__ for key in own)),
        "own": len(own),
        "found": len(found),
        "more": [key for key in found if key not in own],
        "less": [key for key in own if key not in found],
        "forms": dict(Counter(_form(e) for e in seen.excitations.values())),
        "others": dict(Counter(seen.others.values())),
        "unread": seen.unread,
        "gate_error": gate_error(build(**_small(model)).eval(), short, both) if both else None,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _small(model: nn.Module) -> dict[str, int]:
    """Options for a smaller input where that is a part of the network."""
    config = getattr(model, "pretrained_cfg", {})
    large = config.get("fixed_input_size") and config["input_size"][-1] > 256
    return {"img_size": 224} if large else {}


@torch.no_grad()
def gate_error(model: nn.Module, name: str, blocks: list[str]) -> float:
    """Largest difference of a recorded gate from output ÷ input of its module, in float64.

    The quotient is taken over all positions of a channel at once, Σ output·input ÷ Σ input²; a
    channel that is zero everywhere has none.

    Raises:
        RuntimeError: no channel could be compared.
    """
    model.double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():  # as last batch norms are, before which every map is 0
            parameter.normal_()
    for key in blocks:  # as they are drawn, gates hardly differ from their value at 0
        for parameter in model.get_submodule(key).parameters():
            parameter.mul_(2).add_(0.1 * torch.randn_like(parameter))
    quotients: dict[str, Tensor] = {}

    def listen(key: str, module: nn.Module) -> None:
        def heard(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0], output
            if isinstance(module, SqueezeExciteCl):
                x, y = x.movedim(-1, 1), y.movedim(-1, 1)
            x, y = x.flatten(2), y.flatten(2)
            quotients[key] = (x * y).sum(2) / (x * x).sum(2)  # NaN for a channel of zeros

        module.register_forward_hook(heard)

    for key in blocks:
        listen(key, model.get_submodule(key))
    example = _example(model, name, "cpu")
    images = torch.stack(example[0]) if isinstance(example, tuple) else example
    places = getattr(model, "img_size", images.shape[2:])  # what `_small` has asked for
    images = torch.randn(*images.shape[:2], *places, dtype=torch.float64)
    gates = record_gates(model, [images], top=1).blocks
    differences = [
        (gates[key].mean - quotients[key].mean(0)).abs() for key in blocks if key in quotients
    ]
    compared = torch.cat(differences)
    if len(differences) < len(blocks) or compared.isnan().all():
        raise RuntimeError(f"{name}: gates that could not be compared")
    return float(compared[~compared.isnan()].max())


def _arguments(name: str) -> str:
    import inspect

    return str(inspect.signature(torchvision.models.get_model_builder(name)))


def _form(e: Any) -> str:
    steps = [step.function.rstrip("_") for step in e.program]
    return f"{e.squeeze} → {', '.join(steps) or 'nothing'} → {e.gate}"


def _seen(model: nn.Module, name: str, device: str) -> tuple[Anatomy, set[str]]:
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, key=key: called.add(key))
        for key, module in model.named_modules()
        if is_se(module)
    ]
    try:
        return anatomy(model, _example(model, name, device)), called
    finally:
        for handle in handles:
            handle.remove()


def _example(model: nn.Module, name: str, device: str) -> Any:
    config = getattr(model, "pretrained_cfg", None)
    if config is not None:
        size = config["input_size"]
        if device == "cpu" and not config.get("fixed_input_size"):
            size = config.get("min_input_size") or (3, 64, 64)
        return torch.zeros(1, *size, device=device)
    if "rcnn" in name or name.startswith(("retinanet", "fcos", "ssd", "keypoint")):
        return ([torch.zeros(3, 128, 128, device=device)],)
    if name.startswith("raft"):
        return tuple(torch.zeros(1, 3, 128, 128, device=device) for _ in range(2))
    if any(part in name for part in ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")):
        return torch.zeros(1, 3, 16, 224, 224, device=device)
    side = 299 if name == "inception_v3" else 224
    return torch.zeros(1, 3, side, side, device=device)


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all results."""
    good = [row for row in rows if "failed" not in row]
    with_se = [row for row in good if row["own"]]
    equal = [row for row in with_se if not row["more"] and not row["less"]]
    without = [row for row in good if not row["own"]]
    clean = [row for row in without if not row["found"]]
    errors = [row["gate_error"] for row in with_se if row["gate_error"] is not None]
    lines = [
        "# SE blocks found in timm and torchvision",
        "",
        f"timm {timm.__version__}, torchvision {torchvision.__version__}, made by "
        "`scripts/anatomy_table.py`: each network was run once on the meta device, and "
        "`senet.anatomy.excitations` was compared with the modules of the libraries' own SE "
        "classes (SE, ESE, ECA, CBAM's channel half, GatherExcite over the whole map, "
        "GlobalContext's factor) that ran.",
        "",
        f"- {len(good)} of {len(rows)} networks could be run.",
        f"- {len(with_se)} have SE by their classes, {sum(r['own'] for r in with_se)} blocks; in "
        f"{len(equal)} of them exactly these blocks were found.",
        f"- Gates as `senet.record_gates` records them, against output ÷ input of these modules "
        f"in float64: compared in {len(errors)} networks, the largest difference is "
        f"{max(errors):.0e}.",
        f"- {len(without)} have none by their classes; in {len(clean)} of them none was found.",
        "",
        "## Differences",
        "",
        "| network | by class | found | found besides | not found | why |",
        "|---|---:|---:|---|---|---|",
    ]
    for row in good:
        if row["more"] or row["less"]:
            lines.append(
                f"| {row['name']} | {row['own']} | {row['found']} | {_few(row['more'])} | "
                f"{_few(row['less'])} | {REASONS.get(row['name'], '')} |"
            )
    lines += [
        "",
        "## Forms",
        "",
        "| squeeze → program → gate | blocks | networks |",
        "|---|---:|---:|",
    ]
    blocks: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for row in good:
        blocks.update(row["forms"])
        networks.update(row["forms"].keys())
    lines += [f"| {form} | {count} | {networks[form]} |" for form, count in blocks.most_common()]
    lines += ["", "## What looks like SE and is none", "", "| what | networks |", "|---|---:|"]
    others: Counter[str] = Counter(key for row in good for key in row["others"])
    lines += [f"| {what} | {count} |" for what, count in others.most_common()]
    lines += ["", "## Networks with SE", "", "| network | by class | found | classes |"]
    lines += ["|---|---:|---:|---|"]
    for row in with_se:
        classes = ", ".join(f"{count} {name}" for name, count in row["classes"].items())
        lines.append(f"| {row['name']} | {row['own']} | {row['found']} | {classes} |")
    failed = [row for row in rows if "failed" in row]
    if failed:
        lines += ["", "## Not run", "", "| network | reason |", "|---|---|"]
        lines += [f"| {row['name']} | {row['failed'].replace('|', '/')} |" for row in failed]
    return "\n".join(lines) + "\n"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def main() -> None:
    """Examine all networks that are not in the results yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="shell pattern of names, as timm:regnet*")
    parser.add_argument("--out", type=Path, default=Path("docs/anatomy_table.md"))
    parser.add_argument("--results", type=Path, default=Path("anatomy_table.jsonl"))
    arguments = parser.parse_args()
    names = [f"timm:{name}" for name in timm.list_models()]
    names += [f"torchvision:{name}" for name in torchvision.models.list_models()]
    warnings.simplefilter("ignore")
    rows = rows_of(names, arguments.results, examined, only=arguments.only)
    arguments.out.write_text(page(rows))


if __name__ == "__main__":
    main()
