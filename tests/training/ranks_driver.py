"""Trains in two processes and does to them what clusters do; a program, so that it may fork early.

`ranks_driver.py kill CONFIG.toml FOLDER TIMES SEED`: kills a random process at a random moment with
SIGKILL, resumes (killing again, half of the time) and compares with an unharmed run.
`ranks_driver.py hang CONFIG.toml FOLDER`: the second process stops working after its third step.
`ranks_driver.py term CONFIG.toml FOLDER`: the second process gets SIGTERM; then resumes.
`ranks_driver.py resize CONFIG.toml FOLDER`: two processes are stopped, one goes on, and reversed.
`ranks_driver.py gradients CONFIG.toml FOLDER`: the fused tail with batch norm over both.
`ranks_driver.py sync CONFIG.toml FOLDER`: the run with batch norm over both processes.
`ranks_driver.py shard CONFIG.toml FOLDER`: FSDP against DDP; stopped, and on under either.
`ranks_driver.py options CONFIG.toml FOLDER INIT`: FSDP against DDP with other options.

Each prints one JSON line. Processes are forked, so that PyTorch is imported once.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from crash_driver import digests
from safetensors.torch import load_file

from senet.support.progress import Silent
from senet.training.config import RunConfig
from senet.training.loop import Interrupted, resume, train

PATIENCE = 60.0  # seconds for the other process to notice


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(action: Callable[[int], None], world: int = 2) -> list[int]:
    """Run `action(rank)` in forked processes that know each other; their process ids."""
    port, children = free_port(), []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            # PyTorch makes its thread pool anew after a fork, and two threads must not be first.
            torch.set_num_threads(1)
            code = 0
            try:
                action(rank)
            except Interrupted as stopped:
                code = 128 + stopped.number
            except BaseException:
                traceback.print_exc()
                code = 1
            os._exit(code)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit codes, negative for signals; processes that outlive a failed one are killed."""
    codes: dict[int, int] = {}
    failed: float | None = None
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] != 0:
                        failed = failed or time.monotonic()
        if failed and time.monotonic() - failed > PATIENCE:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


class Step(Silent):
    """Does something at the n-th step of a process; notes are kept."""

    def __init__(self, n: int = -1, action: Callable[[], Any] = lambda: None) -> None:
        self.left, self.action = n, action
        self.notes: list[str] = []

    def step(self, images: int, loss: float, lr: float) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()

    def note(self, message: str) -> None:
        self.notes.append(message)


def kill(config: Callable[..., RunConfig], folder: Path, times: int, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    whole = config("unharmed")
    assert wait(launch(lambda _: (train(whole), None)[1])) == [0, 0]
    duration = time.perf_counter() - began
    expected = digests(whole.out)
    clock, wrong, killed = random.Random(seed), [], {"first": 0, "again": 0}
    for number in range(times):
        run = config(f"killed-{number}")

        def go(_: int, run: RunConfig = run) -> None:
            if (run.out / "config.toml").exists():
                resume(run.out)
            else:
                train(run)

        for when in ("first", *(["again"] if clock.random() < 0.5 else [])):
            children = launch(go)
            victim, delay = clock.randrange(2), clock.uniform(0.05, 0.95) * duration
            time.sleep(delay)
            if os.waitpid(children[victim], os.WNOHANG)[0] == 0:
                os.kill(children[victim], signal.SIGKILL)
                codes = wait(children)
                # It may have ended between the two calls above.
                assert codes[victim] in (0, -signal.SIGKILL), codes
                killed[when] += codes[victim] == -signal.SIGKILL
            else:  # it was done already
                wait([child for child in children if child != children[victim]])
        if wait(launch(go)) != [0, 0] or digests(run.out) != expected:
            wrong.append(number)
    return {"runs": times, "killed": killed, "wrong": wrong, "seconds": duration}


def hang(config: Callable[..., RunConfig], folder: Path) -> dict[str, Any]:
    run = config("hung", timeout=2.0)

    def go(rank: int) -> None:
        if rank == 1:
            import senet.training.session as session

            whole, calls = session.Session.train_step, [0]

            def stuck(self: Any, *arguments: Any, **options: Any) -> Any:
                calls[0] += 1
                if calls[0] == 3:
                    stuck_here()
                return whole(self, *arguments, **options)

            session.Session.train_step = stuck  # type: ignore[method-assign]
        train(run)

    return {"codes": wait(launch(go))}


def stuck_here() -> None:
    time.sleep(3600)


def term(config: Callable[..., RunConfig], folder: Path) -> dict[str, Any]:
    whole, run = config("unharmed"), config("stopped", checkpoint_steps=0)
    codes = [wait(launch(lambda _: (train(whole), None)[1]))]

    def stopped(rank: int) -> None:
        import senet.training.session as session

        inner, calls = session.Session.train_step, [0]

        def counting(self: Any, *arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(self, *arguments, **options)

        session.Session.train_step = counting  # type: ignore[method-assign]
        train(run)

    codes += [wait(launch(stopped)), wait(launch(lambda _: (resume(run.out), None)[1]))]
    return {"codes": codes, "equal": digests(run.out) == digests(whole.out)}


def resize(config: Callable[..., RunConfig], folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for before, after in ((2, 1), (1, 2)):
        run = config(f"from{before}")

        def stopped(rank: int, run: RunConfig = run) -> None:
            train(run, progress=Step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))

        def on(rank: int, run: RunConfig = run) -> None:
            heard = Step()
            resume(run.out, progress=heard)
            if rank == 0:
                (run.out / "notes.json").write_text(json.dumps(heard.notes))

        codes = [wait(launch(stopped, before)), wait(launch(on, after))]
        notes = json.loads((run.out / "notes.json").read_text())
        rows = (run.out / "metrics.csv").read_text().splitlines()
        result[f"{before} to {after}"] = {"codes": codes, "notes": notes, "epochs": len(rows) - 1}
    return result


def sync(config: Callable[..., RunConfig], folder: Path) -> dict[str, Any]:
    run = config("sync", sync_bn=True, accumulate=1)
    return {"codes": wait(launch(lambda _: (train(run), None)[1]))}


def difference(one: Path, other: Path) -> float:
    """The largest of two runs' weights, each relative to the largest element of its tensor."""
    found = [load_file(run / "checkpoints/last/model.safetensors") for run in (one, other)]
    assert found[0].keys() == found[1].keys()
    scales = {name: x.double().abs().max().clamp(min=1e-12) for name, x in found[0].items()}
    return max(
        float((found[1][name] - x).abs().max() / scales[name]) for name, x in found[0].items()
    )


def holding(run: Path) -> None:
    """Let each process write how many bytes of what it holds, at its first step."""
    import senet.training.session as session
    from senet.training.fsdp import local

    inner = session.Session.train_step

    def looking(self: Any, *arguments: Any, **options: Any) -> Any:
        loss = inner(self, *arguments, **options)
        kinds = {
            "parameters": self.model.parameters(),
            "average": self.ema.module.parameters(),
            "momentum": [entry["momentum_buffer"] for entry in self.optimizer.state.values()],
        }
        held = {kind: sum(local(t).nbytes for t in found) for kind, found in kinds.items()}
        (run / f"held{self.accelerator.process_index}.json").write_text(json.dumps(held))
        return loss

    session.Session.train_step = looking  # type: ignore[method-assign]


def shard(config: Callable[..., RunConfig], folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"codes": [], "differences": {}, "held": {}}
    runs = {kind: config(kind, parallel=kind) for kind in ("ddp", "fsdp")}
    for kind, run in runs.items():

        def whole(_: int, run: RunConfig = run) -> None:
            holding(run.out)
            train(run)

        result["codes"].append(wait(launch(whole)))
        result["held"][kind] = [
            json.loads((run.out / f"held{rank}.json").read_text()) for rank in range(2)
        ]
    result["differences"]["fsdp"] = difference(runs["ddp"].out, runs["fsdp"].out)
    for first in runs:
        run = config(f"stopped-{first}", parallel=first)

        def stopped(_: int, run: RunConfig = run) -> None:
            train(run, progress=Step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))

        result["codes"].append(wait(launch(stopped)))
    moves = {"fsdp-fsdp": 2, "fsdp-ddp": 2, "ddp-fsdp": 2, "fsdp-alone": 1}
    for name, processes in moves.items():
        first, then = name.split("-")
        place = folder / name
        shutil.copytree(folder / f"stopped-{first}", place)
        options = {"parallel": "fsdp" if then == "fsdp" else "ddp"}

        def on(rank: int, place: Path = place, options: dict[str, str] = options) -> None:
            heard = Step()
            resume(place, options=options, progress=heard)
            if rank == 0:
                (place / "notes.json").write_text(json.dumps(heard.notes))

        result["codes"].append(wait(launch(on, processes)))
        result["differences"][name] = difference(runs["ddp"].out, place)
        result[name] = json.loads((place / "notes.json").read_text())
    result["equal"] = digests(folder / "fsdp-fsdp") == digests(runs["fsdp"].out)
    return result


def options(config: Callable[..., RunConfig], folder: Path, start: str) -> dict[str, Any]:
    result: dict[str, Any] = {"codes": [], "differences": {}}
    base = config("bf16").recipe
    kinds: dict[str, dict[str, Any]] = {
        "bf16": {"recipe": replace(base, mixed_precision="bf16")},
        "sync": {"sync_bn": True, "accumulate": 1},
        "tuned": {"init": start, "train": "se+head", "model_options": {}},
    }
    for name, changes in kinds.items():
        runs = [config(f"{name}-{kind}", parallel=kind, **changes) for kind in ("ddp", "fsdp")]
        for run in runs:
            result["codes"].append(wait(launch(lambda _, run=run: (train(run), None)[1])))
        result["differences"][name] = difference(*(run.out for run in runs))
    return result


def gradients(config: Callable[..., RunConfig], folder: Path) -> dict[str, Any]:
    """Fused tail and join over two halves of a batch against the whole: largest differences."""
    import torch.distributed as dist
    from torch import nn

    from senet.nn.block import SqueezeExcitation
    from senet.nn.branches import joined
    from senet.nn.sync_bn import convert
    from senet.nn.tails import residual_tail

    torch.manual_seed(3)
    blocks: dict[str, nn.Module] = {name: nn.BatchNorm2d(6) for name in ("bn", "other", "a", "b")}
    blocks |= {"se": SqueezeExcitation(6, 2), "se_joined": SqueezeExcitation(18, 3)}
    block = nn.ModuleDict(blocks).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x, r, g = (3 + torch.randn(8, 6, 5, 4, dtype=torch.float64) for _ in range(3))

    def tail(x: torch.Tensor, r: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
        x, r = x.clone().requires_grad_(), r.clone().requires_grad_()
        block.zero_grad()
        out = residual_tail(x, r, block["bn"], block["se"], block["other"])  # type: ignore[arg-type]
        ends = ((x, block["a"]), (r * 2, None), (out - x, block["b"]))
        more = joined(ends, block["se_joined"])  # type: ignore[arg-type]
        ((out + more[:, :6] * more[:, 6:12] - more[:, 12:]) * g).sum().backward()
        found = {"out": out.detach(), "more": more.detach(), "x": x.grad, "r": r.grad}
        found |= {f"grad {name}": p.grad for name, p in block.named_parameters()}
        found |= {name: buffer.clone() for name, buffer in block.named_buffers()}
        return {name: value.detach() for name, value in found.items() if value is not None}

    state = {name: value.clone() for name, value in block.state_dict().items()}
    expected = tail(x, r, g)
    block.load_state_dict(state)

    def half(rank: int) -> None:
        dist.init_process_group("gloo")
        convert(block)
        part = slice(0, 3) if rank == 0 else slice(3, 8)  # unequal
        torch.save(tail(x[part], r[part], g[part]), folder / f"half{rank}.pt")
        dist.destroy_process_group()

    codes = wait(launch(half))
    one, two = (torch.load(folder / f"half{rank}.pt") for rank in (0, 1))
    differences = {}
    for name, value in expected.items():
        if name in ("out", "more", "x", "r"):
            found = torch.cat((one[name], two[name]))
        else:
            found = one[name] + two[name] if name.startswith("grad ") else one[name]
        differences[name] = float((found - value).abs().max())
    return {"codes": codes, "differences": differences}


def main(what: str, config_path: Path, folder: Path, *rest: Any) -> None:
    base = RunConfig.from_toml(config_path).to_dict()

    def config(name: str, **changes: Any) -> RunConfig:
        return RunConfig.from_dict(base, **({"out": folder / name} | changes))

    torch.set_num_threads(1)
    action = {
        "kill": kill,
        "hang": hang,
        "term": term,
        "resize": resize,
        "sync": sync,
        "gradients": gradients,
        "shard": shard,
        "options": options,
    }[what]
    print(json.dumps(action(config, folder, *rest)))


if __name__ == "__main__":
    numbers = (int(text) if text.isdigit() else text for text in sys.argv[4:])
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *numbers)
