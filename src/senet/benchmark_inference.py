"""Inference against timm, torch.compile, ONNX Runtime and OpenVINO: contestants and conclusions.

Every peer runs timm's network of the same architecture, with SE and plain; ours are
`senet.optimize` and, in ONNX Runtime, `senet.export`. Each contestant has the same threads and the
same allocator. Timings of engines need a machine that does nothing else.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from senet.benchmark import Case, Contestant, Measurement
from senet.errors import UserError
from senet.export_network import export
from senet.export_onnx import write_onnx
from senet.export_runtimes import onnx_session, open_exported, openvino_session, optional
from senet.factory import create_model
from senet.inference import optimize
from senet.models import entry

BATCH_SIZES = (1, 16)
# timm's names of the same networks; CIFAR networks have no counterpart there.
PEERS = {
    "resnet50": "resnet50",
    "se_resnet50": "seresnet50",
    "resnet101": "resnet101",
    "se_resnet101": "seresnet101",
    "resnet152": "resnet152",
    "se_resnet152": "seresnet152",
    "resnext50_32x4d": "resnext50_32x4d",
    "se_resnext50_32x4d": "seresnext50_32x4d",
    "resnext101_32x4d": "resnext101_32x4d",
    "se_resnext101_32x4d": "seresnext101_32x4d",
    "senet154": "senet154",
}
OURS = "senet.optimize"
_SETTLED = 4  # larger batches run so long that a few milliseconds do not count
EXPORTED, EAGER, COMPILED = "senet.export", "eager", "torch.compile"
ENGINES = (EXPORTED, EAGER, COMPILED, "ONNX Runtime", "OpenVINO")
Run = Callable[[], object]


@dataclass(frozen=True)
class _Subject:
    """A network that contestants run.

    Attributes:
        label: the network's name as the contestants' names show it.
        model: the network.
    """

    label: str
    model: nn.Module


def _guarded(run: Callable[[Tensor], object], x: Tensor) -> Run:
    def once() -> object:
        with torch.inference_mode():
            return run(x)

    return once


def _engines(
    subject: _Subject, x: Tensor, folder: Path, engines: Sequence[str]
) -> list[Contestant]:
    """Peer engines on one network."""
    model = subject.model.eval()
    fast = model.to(memory_format=torch.channels_last)
    images = x.contiguous(memory_format=torch.channels_last)
    found = []
    if EAGER in engines:
        found.append(Contestant(f"eager {subject.label}", _guarded(fast, images)))
    if COMPILED in engines:
        frozen = torch.compile(fast, options={"freezing": True})
        found.append(Contestant(f"torch.compile {subject.label}", _guarded(frozen, images)))
    path = folder / f"{subject.label}-{len(x)}.onnx"
    sessions = {"ONNX Runtime": onnx_session, "OpenVINO": openvino_session}
    wanted = [name for name in sessions if name in engines]
    if wanted:
        write_onnx(model, x, path, batch=len(x), any_size=False, opset=18)
    for name in wanted:
        run, _ = sessions[name](path)
        found.append(Contestant(f"{name} {subject.label}", functools.partial(run, x)))
    return found


def _plain_name(name: str) -> str:
    """The network without SE of a network."""
    found = entry(name)
    return found.twin if found.se else name


def contestants(
    name: str, batch: int, *, engines: Sequence[str] = ENGINES, plain_peers: bool = True
) -> list[Contestant]:
    """Ours and the peers' for a network and its plain one; ours first."""
    torch.manual_seed(0)
    model, plain = create_model(name).eval(), create_model(_plain_name(name)).eval()
    x = torch.randn(batch, *model.input_size)
    folder = Path(tempfile.mkdtemp(prefix="senet-bench-"))
    found = [
        Contestant(f"{OURS} {name}", _guarded(optimize(model, x), x)),
        Contestant(f"{OURS} {_plain_name(name)}", _guarded(optimize(plain, x), x)),
    ]
    if EXPORTED in engines:
        exported = folder / "ours.onnx"
        report = export(model, exported, example_input=x, batch=batch)
        run = open_exported(exported).run
        found.append(Contestant(f"senet.export {name} ({report.form})", lambda: run(x)))
    subjects = _subjects(name, model, plain)
    for subject in subjects if plain_peers else subjects[:1]:
        found += _engines(subject, x, folder, engines)
    return found


def _subjects(name: str, model: nn.Module, plain: nn.Module) -> list[_Subject]:
    """What the peers run: timm's networks where it has them, else ours."""
    if name not in PEERS:
        return [_Subject(name, model), _Subject(_plain_name(name), plain)]
    timm = optional("timm")
    peers = [PEERS[name]]
    if _plain_name(name) in PEERS:
        peers.append(PEERS[_plain_name(name)])
    return [_Subject(f"timm {peer}", timm.create_model(peer)) for peer in peers]


def cases(
    models: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    engines: Sequence[str] = ENGINES,
    plain_peers: bool = True,
) -> list[Case]:
    """A case for each network and batch.

    Args:
        models: names of our networks with SE.
        batch_sizes: images of a batch.
        engines: some of `ENGINES`, beside `senet.optimize`.
        plain_peers: whether the peers run the plain network too; ours does in any case.

    Raises:
        UserError: unknown network, one without SE, an unknown engine, or a batch below 1.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"engines must be some of {', '.join(ENGINES)}, got {engine!r}")
    if min(batch_sizes) < 1:
        raise UserError(f"--batch-sizes must be at least 1, got {tuple(batch_sizes)}")
    for name in models:
        if not entry(name).se:
            raise UserError(f"{name} has no SE blocks: name {entry(name).twin} instead")
    return [
        Case(
            "inference",
            f"{name}, batch {batch}",
            functools.partial(contestants, name, batch, engines=engines, plain_peers=plain_peers),
        )
        for name in models
        for batch in batch_sizes
    ]


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """SE's price in our engine, and ours with SE against the fastest peer without, per case."""
    lines = []
    for case in dict.fromkeys(m.case for m in measurements):
        rows = [m for m in measurements if m.case == case]
        name = case.partition(",")[0]
        plain = _plain_name(name)
        price = next(1 / m.ratio for m in rows if m.contestant == f"{OURS} {plain}")
        peers = [m for m in rows if not m.contestant.startswith("senet.")]
        without = [m for m in peers if m.contestant.endswith(f" {PEERS.get(plain, plain)}")]
        parts = [f"SE costs {100 * (price - 1):+.1f}%"]
        if without:
            best = min(without, key=lambda m: m.ratio)
            parts.append(f"{best.ratio:.2f}× as fast as the fastest plain peer ({best.contestant})")
        if peers:
            best = min(peers, key=lambda m: m.ratio)
            parts.append(f"{best.ratio:.2f}× as fast as the fastest peer ({best.contestant})")
        lines.append(f"{case}: senet.optimize: " + ", ".join(parts))
    return lines
