"""Many convolutional networks of timm and torchvision in `senet.optimize`: exactness and speed.

    python scripts/inference_table.py [--only PATTERN] [--out docs/inference_table.md]
    python scripts/inference_table.py --untimed            # on a busy machine
    python scripts/inference_table.py --again-below 1.0    # once it is quiet

Which networks is a rule, and not a choice: of each file of timm's models the first, the last and
the three at the quarters of its list by name, all classification networks of torchvision, and
those of docs/deployment.md. Of these the convolutional ones count (convolutions do at least nine
tenths of the multiply-adds) with at most 100 million parameters. They come in rounds, so that an
interrupted run has seen every file: those named, the first of each file, all of torchvision, the
last of each file, and those in between.

Each network runs in a process of its own: fresh weights with batch norm statistics and biases drawn
at random (fresh ones hide mistakes), 224² (or its own size if it takes no other), batch 1. Its
optimized form is compared with eager on that example and on another batch and size, and timed
against eager with channels last, in turns. What was measured is kept in a file (`--results`), from
which an interrupted run goes on: a network that has its row is not examined again, unless it
failed, has no times yet (`--untimed`), or was less than `--again-below` times as fast as eager.
Takes some hours on two cores; not a part of the test suite.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from resumable import rows_of
from torch import Tensor, nn

from senet import kernels
from senet.anatomy import anatomy
from senet.anatomy.describe import multiply_adds
from senet.errors import UserError
from senet.inference import optimize
from senet.inference.measurement import outside
from senet.inference.outputs import tensors
from senet.inference.report import FUSED
from senet.inference.rounding import difference
from senet.networks.anywhere import open_source
from senet.support.allocator import tune_allocator

NAMED = (
    *("timm:efficientnet_b0", "timm:efficientnet_b3", "timm:tf_efficientnetv2_b0"),
    *("timm:mobilenetv3_large_100", "timm:mobilenetv3_small_100", "timm:regnety_016"),
    *("timm:lcnet_100", "timm:ghostnet_100", "timm:semnasnet_100", "timm:rexnet_100"),
    *("timm:resnetrs50", "timm:seresnet50", "timm:seresnext50_32x4d", "timm:ese_vovnet19b_dw"),
    "timm:repvgg_a2",
)
LARGEST = 100_000_000
SECONDS = 240  # for one network
ROUNDS, PAUSE = 9, 0.05


def candidates() -> list[str]:
    """Names by the rule, before it is known which are convolutional."""
    files = [sorted(timm.list_models(module=file)) for file in timm.list_modules()]
    lasts = [(models, len(models) - 1) for models in files if models]
    rounds = [
        [f"timm:{models[0]}" for models, _ in lasts],
        [
            f"torchvision:{name}"
            for name in torchvision.models.list_models(module=torchvision.models)
        ],
        [f"timm:{models[last]}" for models, last in lasts],
        [f"timm:{models[last // 2]}" for models, last in lasts],
        [f"timm:{models[last // 4]}" for models, last in lasts],
        [f"timm:{models[last - last // 4]}" for models, last in lasts],
    ]
    return list(dict.fromkeys((*NAMED, *itertools.chain(*rounds))))


def shape_or_obstacle(name: str) -> tuple[int, ...] | str:
    """Channels, height and width for a network, or why it is not of the table."""
    try:
        with torch.device("meta"):
            model = open_source(name).eval()
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        model = open_source(name).eval().to("meta")
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return "more than 100 million parameters"
    own = tuple(model.input_size)
    fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
    usual = (3, 299, 299) if name.endswith("inception_v3") else (3, 224, 224)
    try:
        shape = own if fixed else usual
        seen = anatomy(model, torch.zeros(1, *shape, device="meta"))
    except UserError:
        shape = own
        seen = anatomy(model, torch.zeros(1, *shape, device="meta"))
    counts = [(node.kind, multiply_adds(node)) for node in seen.trace.nodes]
    total = sum(count for _, count in counts)
    share = sum(count for kind, count in counts if kind == "conv") / max(total, 1)
    return shape if share >= 0.9 else f"convolutions are {share:.0%} of it"


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Statistics as if images had been seen, and biases other than zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.8, 1.2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.1)


def milliseconds(network: nn.Module, x: Tensor) -> float:
    """Milliseconds of a call after one that does not count, and a pause before both."""
    time.sleep(PAUSE)
    network(x)
    began = time.perf_counter()
    network(x)
    return 1e3 * (time.perf_counter() - began)


def examine(name: str, *, timed: bool = True) -> dict[str, Any]:
    """A row of the table, with times or without."""
    shape = shape_or_obstacle(name)
    if isinstance(shape, str):
        return {"name": name, "skipped": shape}
    tune_allocator()
    torch.manual_seed(0)
    model = open_source(name).eval()
    randomise(model)
    x = torch.randn(1, *shape)
    optimized = optimize(model, x, measure=False)
    with torch.inference_mode():
        found = [distances(model, optimized, images) for images in (x, other_size(model, shape))]
        times = times_of(model, optimized, x) if timed else {}
    blocks = optimized.report.blocks
    return {
        "name": name,
        "blocks": len(blocks),
        "fused": sum(what == FUSED for what in blocks.values()),
        **{key: max(each[key] for each in found) for key in found[0]},
        **times,
        "outside": outside(optimized.network, x),
        "left": [list(each) for each in optimized.report.left],
        "isa": kernels.instruction_set(),
    }


def times_of(model: nn.Module, optimized: nn.Module, x: Tensor) -> dict[str, float]:
    """Median milliseconds of eager with channels last and of the optimized network."""
    eager = copy.deepcopy(model)
    for parameter in eager.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last)
    images = x.contiguous(memory_format=torch.channels_last)
    rounds = [(milliseconds(eager, images), milliseconds(optimized, x)) for _ in range(ROUNDS)]
    before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {"eager": before, "optimized": after}


def distances(model: nn.Module, optimized: nn.Module, x: Tensor) -> dict[str, float]:
    """How far both are from each other, and each from float64."""
    wanted, found = model(x), optimized(x)
    exact = copy.deepcopy(model).double()(x.double())
    own, ours = (
        difference([t.double() for t in tensors(result)], exact) for result in (wanted, found)
    )
    return {"difference": difference(found, wanted), "own": own, "ours": ours}


def other_size(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Three images of another size; of the same where the network takes no other."""
    _, height, width = shape
    x = torch.randn(3, 3, height - 32, width + 32)
    try:
        model(x)
    except (RuntimeError, AssertionError, ValueError):
        x = torch.randn(3, *shape)
    return x


def in_process(name: str, timed: bool) -> dict[str, Any]:
    """`examine` in a process that may take so long."""
    command = [sys.executable, __file__, "--one", name, *([] if timed else ["--untimed"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"took more than {SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"name": name, "failed": last[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all results."""
    good = [row for row in rows if "difference" in row]
    failed = [row for row in rows if "failed" in row]
    skipped = [row for row in rows if "skipped" in row]
    exact = [row for row in good if row["difference"] <= 1e-5]
    explained = [r for r in good if r not in exact and r["difference"] <= 10 * r["own"]]
    wrong = [row["name"] for row in good if row not in exact and row not in explained]
    speeds = {row["name"]: row["eager"] / row["optimized"] for row in good if "eager" in row}
    slower = [name for name, speed in speeds.items() if speed < 1]
    blocks, fused = sum(row["blocks"] for row in good), sum(row["fused"] for row in good)
    mean = statistics.geometric_mean(speeds.values()) if speeds else 1
    untimed = f", of {len(speeds)} that were timed" if len(speeds) < len(good) else ""
    isa = ", ".join(sorted({str(row["isa"]) for row in good}))
    lines = [
        "# Networks of timm and torchvision in senet.optimize",
        "",
        f"timm {timm.__version__}, torchvision {torchvision.__version__}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads of {processor()} ({isa}), made by "
        "`scripts/inference_table.py`, which says how the networks were chosen: float32, 224², "
        "batch 1, median of 9 rounds in turns, `measure=False`.",
        "",
        f"- {len(good)} convolutional networks ({len(failed)} more failed; {len(skipped)} of the "
        "candidates are not convolutional, or larger than 100 million parameters).",
        f"- Outputs within 1e-5 of eager's (relative to the largest, at two sizes): {len(exact)}; "
        f"further off, but within ten times eager's own distance from float64: {len(explained)}; "
        f"beyond: {', '.join(wrong) or 'none'}.",
        f"- {mean:.2f}× as fast as eager with channels last (geometric mean{untimed}); slower: "
        f"{', '.join(slower) or 'none'}. By default `optimize` keeps the original there.",
        f"- {fused} of {blocks} SE blocks fused.",
        "",
        "| network | SE fused | difference | eager from float64 | ours from float64 | eager, ms | "
        "ours, ms | × | outside |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in good:
        share = sum(row["outside"].values())
        most = [f"{name} {part:.0%}" for name, part in list(row["outside"].items())[:3]]
        times = [row["eager"], row["optimized"], speeds[row["name"]]] if "eager" in row else []
        before, after, speed = map("{:.4g}".format, times) if times else ("", "", "")
        lines.append(
            f"| {row['name']} | {row['fused']} of {row['blocks']} | {row['difference']:.1e} | "
            f"{row['own']:.1e} | {row['ours']:.1e} | {before} | {after} | {speed} | "
            f"{f'{share:.0%}: ' + ', '.join(most) if most else ''} |"
        )
    for title, group, key in (("Failed", failed, "failed"), ("Left out", skipped, "skipped")):
        if group:
            lines += ["", f"## {title}", "", "| network | why |", "|---|---|"]
            lines += [f"| {row['name']} | {row[key].replace('|', '/')} |" for row in group]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Examine all networks that are not in the results yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="shell pattern of names, as timm:regnet*")
    parser.add_argument("--out", type=Path, default=Path("docs/inference_table.md"))
    parser.add_argument("--results", type=Path, default=Path("inference_table.jsonl"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--untimed", action="store_true", help="measure no times")
    parser.add_argument(
        "--again-below",
        type=float,
        default=0.0,
        help="examine again what was less than so many times as fast as eager",
    )
    parser.add_argument("--one", help="print the row of this network")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        print(json.dumps(examine(arguments.one, timed=not arguments.untimed)))
        return

    def stale(row: dict[str, Any]) -> bool:
        if "failed" in row or "skipped" in row or arguments.untimed:
            return "failed" in row
        return "eager" not in row or row["eager"] / row["optimized"] < arguments.again_below

    rows = rows_of(
        candidates(),
        arguments.results,
        lambda name: in_process(name, timed=not arguments.untimed),
        only=arguments.only,
        seconds=arguments.seconds,
        stale=stale,
    )
    arguments.out.write_text(page(rows))


if __name__ == "__main__":
    main()
