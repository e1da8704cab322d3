"""Many convolutional networks of timm and torchvision in `senet.optimize`: exactness and speed.

    python scripts/inference_table.py --choose             # writes scripts/inference_table.txt
    python scripts/inference_table.py [--only PATTERN] [--out docs/inference_table.md]
    python scripts/inference_table.py --untimed            # on a busy machine
    python scripts/inference_table.py --again-below 1.0    # once it is quiet

Which networks is a rule, and not a choice: those of docs/deployment.md, all classification networks
of torchvision, and of each file of timm's models one, the first that counts of these of its list
by name: the first, the last, and those at the half and the quarters. A network counts if it is
convolutional (convolutions do at least nine tenths of the multiply-adds) and has at most 100
million parameters. `--choose` wrote them into inference_table.txt before any was examined.

Each network runs in a process of its own: fresh weights with batch norm statistics and biases drawn
at random (fresh ones hide mistakes), 224² (or its own size if it takes no other), batch 1. Its
optimized form is compared with eager on that example and on another batch and size, and timed
against eager with channels last, in turns, with a pause before each. What was measured is kept in
a file (`--results`), from which an interrupted run goes on: a network that has its row is not
examined again, unless it failed. Of one that has no times yet (`--untimed`), or was less than
`--again-below` times as fast as eager, only the times are taken: some 15 seconds a network, at most
`--limit` (who took longer is tried again with `--again-below`). Not a part of the test suite.
"""

import argparse
import copy
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
from resumable import recorded, rows_of
from torch import Tensor, nn

from senet import kernels
from senet.anatomy import anatomy
from senet.anatomy.describe import multiply_adds
from senet.errors import UserError
from senet.inference import optimize
from senet.inference.measurement import outside
from senet.inference.optimization import OptimizedModel
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
CHOSEN = Path(__file__).with_suffix(".txt")
EXAMINATION = 240.0  # seconds for one network
ROUNDS, FEWEST_ROUNDS, PAUSE = 9, 5, 0.05
TURNS = 8.0  # seconds after which the fewest rounds are enough


def choose() -> dict[str, tuple[int, ...]]:
    """The networks by the rule, with channels, height and width of their inputs."""
    chosen: dict[str, tuple[int, ...]] = {}
    names = [
        f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)
    ]
    groups = [[name] for name in (*NAMED, *names)]
    for file in timm.list_modules():
        models = [f"timm:{name}" for name in sorted(timm.list_models(module=file))]
        last = len(models) - 1
        groups.append([models[i] for i in (0, last, last // 2, last // 4, last - last // 4)])
    for group in filter(None, groups):
        for name in group:
            shape = shape_or_obstacle(name)
            if not isinstance(shape, str):
                chosen[name] = shape
                break
    return chosen


def chosen() -> dict[str, tuple[int, ...]]:
    """What `choose` has written down."""
    lines = [line.split() for line in CHOSEN.read_text().splitlines()]
    return {name: tuple(map(int, shape)) for name, *shape in lines}


def shape_or_obstacle(name: str) -> tuple[int, ...] | str:
    """Channels, height and width for a network, or why it is not of the table."""
    model: Any
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
            if module.running_mean is not None and module.running_var is not None:
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


def prepared(name: str) -> tuple[nn.Module, OptimizedModel, Tensor]:
    """A network, its optimized form, and an example."""
    tune_allocator()
    torch.manual_seed(0)
    model = open_source(name).eval()
    randomise(model)
    x = torch.randn(1, *chosen()[name])
    return model, optimize(model, x, measure=False), x


def examine(name: str) -> dict[str, Any]:
    """A row of the table, without times."""
    model, optimized, x = prepared(name)
    with torch.inference_mode():
        found = [distances(model, optimized, images) for images in (x, other_size(model, x))]
    blocks = optimized.report.blocks
    return {
        "name": name,
        "blocks": len(blocks),
        "fused": sum(what == FUSED for what in blocks.values()),
        **{key: max(each[key] for each in found) for key in found[0]},
        "outside": outside(optimized.network, x),
        "left": [list(each) for each in optimized.report.left],
        "isa": kernels.instruction_set(),
    }


@torch.inference_mode()
def times_of(name: str) -> dict[str, Any]:
    """Median milliseconds of eager with channels last and optimized, and what ran outside."""
    model, optimized, x = prepared(name)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last)
    images = x.contiguous(memory_format=torch.channels_last)
    rounds: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(rounds) < ROUNDS:
        if len(rounds) >= FEWEST_ROUNDS and time.perf_counter() - began > TURNS:
            break
        rounds.append((milliseconds(model, images), milliseconds(optimized, x)))
    before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
    shares = outside(optimized.network, x)
    return {"eager": before, "optimized": after, "rounds": len(rounds), "outside": shares}


def distances(model: nn.Module, optimized: nn.Module, x: Tensor) -> dict[str, float]:
    """How far both are from each other, and each from float64."""
    wanted, found = model(x), optimized(x)
    exact = copy.deepcopy(model).double()(x.double())
    own, ours = (
        difference([t.double() for t in tensors(result)], exact) for result in (wanted, found)
    )
    return {"difference": difference(found, wanted), "own": own, "ours": ours}


def other_size(model: nn.Module, x: Tensor) -> Tensor:
    """Three images of another size; of the same where the network takes no other."""
    _, channels, height, width = x.shape
    other = torch.randn(3, channels, height - 32, width + 32)
    try:
        model(other)
    except (RuntimeError, AssertionError, ValueError):
        other = torch.randn(3, *x.shape[1:])
    return other


def in_process(name: str, what: str, limit: float) -> dict[str, Any]:
    """What `--one` prints in a process that may take so many seconds, or why it "failed"."""
    command = [sys.executable, __file__, "--one", name, "--what", what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"took more than {limit:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"name": name, "failed": last[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def row_of(name: str, known: dict[str, Any], *, timed: bool, limit: float) -> dict[str, Any]:
    """A row, of which the exactness may be known already."""
    row = known if "difference" in known else in_process(name, "examine", EXAMINATION)
    if not timed or "failed" in row:
        return row
    times = in_process(name, "times_of", limit)
    return {**row, "late": times["failed"]} if "failed" in times else {**row, **times}


def page(rows: list[dict[str, Any]]) -> str:
    """The page of all results."""
    good = [row for row in rows if "difference" in row]
    failed = [row for row in rows if "failed" in row]
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
        f"batch 1, median of {FEWEST_ROUNDS} to {ROUNDS} rounds in turns, `measure=False`; written "
        f"on {time.strftime('%Y-%m-%d')}.",
        "",
        f"- {len(good)} convolutional networks; {len(failed)} more failed.",
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
    if failed:
        lines += ["", "## Failed", "", "| network | why |", "|---|---|"]
        lines += [f"| {row['name']} | {row['failed'].replace('|', '/')} |" for row in failed]
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
    parser.add_argument("--limit", type=float, default=25.0, help="seconds of times a network")
    parser.add_argument("--choose", action="store_true", help="write down which networks")
    parser.add_argument("--one", help="print the row of this network, or what --what says")
    parser.add_argument("--what", default="examine", choices=["examine", "times_of"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.choose:
        lines = [" ".join((name, *map(str, shape))) for name, shape in choose().items()]
        CHOSEN.write_text("\n".join(lines) + "\n")
        return
    if arguments.one:
        print(json.dumps({"examine": examine, "times_of": times_of}[arguments.what](arguments.one)))
        return
    known = recorded(arguments.results)

    def stale(row: dict[str, Any]) -> bool:
        if "failed" in row or arguments.untimed:
            return "failed" in row
        if "eager" not in row:
            return "late" not in row or arguments.again_below > 0
        return row["eager"] / row["optimized"] < arguments.again_below

    rows = rows_of(
        list(chosen()),
        arguments.results,
        lambda name: row_of(
            name, known.get(name, {}), timed=not arguments.untimed, limit=arguments.limit
        ),
        only=arguments.only,
        seconds=arguments.seconds,
        stale=stale,
    )
    arguments.out.write_text(page(rows))


if __name__ == "__main__":
    main()
