"""What a second process gives and what DDP costs, on one machine with two cores, over gloo.

python benchmarks/two_processes.py [--model se_resnet20_cifar] [--batch-size 128] [--rounds 5]

Steps of a real run (`senet.training.session.Session`: loader, forward, backward, SGD) on the
embedded data. In each round every case runs in fresh, forked processes, one case after the other,
so that a change of the machine's speed meets all of them; a ratio is taken within its round.
Prints a JSON line a round, then medians and spreads; `docs/cluster.md` records them.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from senet.support.allocator import tune_allocator
from senet.training.config import RunConfig
from senet.training.fsdp import local
from senet.training.recipe import get_recipe
from senet.training.session import Session

# name: processes, threads of each, what is special
CASES = {
    "1 process": (1, 1, "plain"),
    "2 processes": (2, 1, ""),
    "2 processes, no exchange": (2, 1, "alone"),
    "2 processes, sync_bn": (2, 1, "sync_bn"),
    "2 processes, fsdp": (2, 1, "fsdp"),
    "1 process, 2 threads": (1, 2, "plain"),
    "1 process within DDP": (1, 1, "ddp"),
}


def measure(given: argparse.Namespace, threads: int, special: str) -> dict[str, float]:
    """Seconds a step in this process, and of exchanges."""
    torch.set_num_threads(threads)
    if special == "plain":  # as without torchrun
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    config = RunConfig(
        model=given.model,
        data="embedded",
        image_size=given.image_size,
        recipe=get_recipe("quick", batch_size=given.batch_size),
        out=Path("unused"),
        device="cpu",
        sync_bn=special == "sync_bn",
        parallel="fsdp" if special == "fsdp" else "ddp",
    )
    session = Session(config)
    if special == "ddp":
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        if session.wrapped is session.model:
            session.wrapped = torch.nn.parallel.DistributedDataParallel(session.model)
    assert (session.wrapped is session.model) == (special in ("plain", "fsdp"))
    batches = session.batches(0)
    quiet = session.wrapped.no_sync if special == "alone" else nullcontext
    for step in range(given.warmup + given.steps):
        if step == given.warmup:
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
        images, targets = next(batches)
        with quiet():
            session.train_step(images, targets, step + 1)
    found = {"step": (time.perf_counter() - began) / given.steps}
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux: KiB
    held: dict[str, float] = {
        "parameters": sum(local(p).nbytes for p in session.model.parameters()),
        "momentum": sum(
            local(entry["momentum_buffer"]).nbytes for entry in session.optimizer.state.values()
        ),
        "resident": psutil.Process().memory_info().rss,
        "peak": usage,
    }
    found |= {f"{name} MB": value / 1e6 for name, value in held.items()}
    if special == "" and dist.is_initialized():
        size = sum(p.numel() for p in session.model.parameters())
        for name, count in (("gradients", size), ("1 number", 1), ("64 MiB", 2**24)):
            found[name] = exchange(count)
    return found


def exchange(count: int, times: int = 15) -> float:
    """Median seconds of an all-reduce of so many float32 numbers."""
    numbers, seconds = torch.ones(count), []
    for _ in range(times):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def run(given: argparse.Namespace, folder: Path, case: str) -> dict[str, float]:
    processes, threads, special = CASES[case]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def go(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        # PyTorch makes its thread pool anew after a fork, and two threads must not be first.
        torch.set_num_threads(1)
        found = measure(given, threads, special)
        (folder / f"{rank}.json").write_text(json.dumps(found))

    start_processes(go, nprocs=processes, start_method="fork")
    every = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: max(each[name] for each in every) for name in every[0]}


def spread(values: list[float], digits: int = 3) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="se_resnet20_cifar")
    parser.add_argument("--batch-size", type=int, default=128, help="over all processes")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--no-tune-allocator", action="store_true")
    given = parser.parse_args()
    if not given.no_tune_allocator:
        tune_allocator()
    torch.set_num_threads(1)
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            # Every other round backwards: a drift then favours no case.
            order = given.cases if number % 2 == 0 else given.cases[::-1]
            found: dict[str, dict[str, Any]] = {c: run(given, Path(folder), c) for c in order}
            load = os.getloadavg()[0]
            print(json.dumps({"round": number, "load": round(load, 2), **found}), flush=True)
            rounds.append(found)
    base = given.cases[0]
    print(f"{given.model}, batch {given.batch_size}: median (least–most) of {given.rounds} rounds")
    for case in given.cases:
        rates = [given.batch_size / r[case]["step"] for r in rounds]
        ratios = [r[base]["step"] / r[case]["step"] for r in rounds]
        print(f"{case}: {spread(rates, 0)} images/s, {spread(ratios)} of {base}")
        kinds = ("parameters MB", "momentum MB", "resident MB", "peak MB")
        print("   ", ", ".join(f"{k} {spread([r[case][k] for r in rounds], 1)}" for k in kinds))
    for name in ("gradients", "1 number", "64 MiB"):
        times = [1e3 * r["2 processes"][name] for r in rounds if "2 processes" in r]
        if times:
            print(f"all-reduce of {name}: {spread(times)} ms")


if __name__ == "__main__":
    main()
