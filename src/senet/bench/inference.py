"""Inference against timm, torch.compile, ONNX Runtime and OpenVINO: contestants and conclusions.

Every peer runs timm's network of the same architecture, with SE and plain; ours are
`senet.optimize` and, in ONNX Runtime, `senet.export`. Each contestant has the same threads and the
same allocator. Timings of engines need a machine that does nothing else. On a GPU there is PyTorch
alone: `network_cases`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from senet.anatomy import excitations
from senet.bench.networks import Entrant, entrants
from senet.bench.setting import Device, Setting, called
from senet.bench.timing import Case, Contestant, Measurement
from senet.errors import UserError
from senet.inference import optimize
from senet.inference.report import OPTIMIZED
from senet.models import entry, list_models
from senet.networks.anywhere import WITHOUT_SE, is_foreign, open_source
from senet.networks.create import create_model
from senet.runtimes.export import export
from senet.runtimes.onnx import write_onnx
from senet.runtimes.sessions import onnx_session, open_exported, openvino_session
from senet.support.extras import optional

BATCH_SIZES: dict[Device, tuple[int, ...]] = {"cpu": (1, 16), "cuda": (1, 256)}
IMAGE_SIZE = 224
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
    path = Path(tempfile.mkdtemp(dir=folder)) / "network.onnx"
    sessions = {"ONNX Runtime": onnx_session, "OpenVINO": openvino_session}
    wanted = [name for name in sessions if name in engines]
    if wanted:
        write_onnx(model, x, path, batch=len(x), any_size=False, opset=18)
    for name in wanted:
        run, _ = sessions[name](path)
        found.append(Contestant(f"{name} {subject.label}", functools.partial(run, x)))
    return found


def _without_se(name: str, model: nn.Module) -> _Subject | None:
    """The same network without SE; None where there is no saying which that is."""
    if name in list_models():
        twin = entry(name).twin
        return _Subject(twin, create_model(twin))
    if is_foreign(name):
        if not excitations(model):
            return None
        return _Subject(f"{name} without SE", open_source(name, **{WITHOUT_SE: True}))
    config = getattr(model, "config", {})
    known = config.get("name", "")
    if known not in list_models() or not entry(known).se or "inserted" in config:
        return None
    sizes = {key: config[key] for key in ("num_classes", "in_channels")}
    twin = entry(known).twin
    return _Subject(f"{twin} for {name}", create_model(twin, **sizes))


def contestants(
    name: str,
    batch: int,
    *,
    engines: Sequence[str] = ENGINES,
    plain_peers: bool = True,
    open_model: Callable[[str], nn.Module] = create_model,
) -> list[Contestant]:
    """Ours and the peers' for a network and its plain one; ours first.

    Of networks of others the one without SE, which only `senet.anatomy` makes, runs in ours alone.
    """
    torch.manual_seed(0)
    model = open_model(name).cpu().float().eval()
    plain = _without_se(name, model)
    x = torch.randn(batch, *getattr(model, "input_size", (3, 224, 224)))
    folder = Path(tempfile.mkdtemp(prefix="senet-bench-"))
    subjects = [_Subject(name, model), *([] if plain is None else [plain])]
    found = [_ours(subject, x) for subject in subjects]
    if EXPORTED in engines:
        exported = folder / "ours.onnx"
        report = export(model, exported, example_input=x, batch=batch)
        run = open_exported(exported).run
        found.append(Contestant(f"senet.export {name} ({report.form})", lambda: run(x)))
    peers = [_as_timm(subject) for subject in subjects]
    for subject in peers if plain_peers and not is_foreign(name) else peers[:1]:
        found += _engines(subject, x, folder, engines)
    return found


def _ours(subject: _Subject, x: Tensor) -> Contestant:
    """A network in `senet.optimize`, which says so where it keeps the original."""
    optimized = optimize(subject.model.eval(), x)
    kept = optimized.report.kept
    note = "" if kept == OPTIMIZED else f" ({kept})"
    return Contestant(f"{OURS} {subject.label}{note}", _guarded(optimized, x))


def _as_timm(subject: _Subject) -> _Subject:
    """What the peers run: timm's network where it has the same, else ours."""
    if subject.label not in PEERS:
        return subject
    peer = PEERS[subject.label]
    return _Subject(f"timm {peer}", optional("timm").create_model(peer))


def cases(
    models: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    engines: Sequence[str] = ENGINES,
    plain_peers: bool = True,
    open_model: Callable[[str], nn.Module] = create_model,
) -> list[Case]:
    """A case for each network and batch.

    Args:
        models: names of our networks with SE, or anything else that `open_model` takes.
        batch_sizes: images of a batch.
        engines: some of `ENGINES`, beside `senet.optimize`.
        plain_peers: whether the peers run the plain network too, of ours; ours does in any case.
        open_model: gives the network of a name, once for each batch.

    Raises:
        UserError: unknown network, one without SE, an unknown engine, or a batch below 1.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"engines must be some of {', '.join(ENGINES)}, got {engine!r}")
    _check_sizes(batch_sizes)
    for name in models:
        if name in list_models() and not entry(name).se:
            raise UserError(f"{name} has no SE blocks: name {entry(name).twin} instead")
    return [
        Case(
            "inference",
            f"{name}, batch {batch}",
            functools.partial(
                contestants,
                name,
                batch,
                engines=engines,
                plain_peers=plain_peers,
                open_model=open_model,
            ),
        )
        for name in models
        for batch in batch_sizes
    ]


def _check_sizes(batch_sizes: Sequence[int]) -> None:
    if min(batch_sizes) < 1:
        raise UserError(f"--batch-sizes must be at least 1, got {tuple(batch_sizes)}")


def _forward(network: Entrant, x: Tensor, at: Setting) -> Run:
    """Inference of a network on float32 images, in the setting's precision."""
    model = network.make().to(x.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    model = (optimize(model, x) if network.ours else model).to(at.dtype)
    # as fast as torch.compile gets on a GPU: with CUDA graphs
    run = called(model, compiled=network.compiled, mode="reduce-overhead")
    return _guarded(run, x.to(at.dtype))


def _network_contestants(
    networks: Mapping[str, Entrant], batch: int, at: Setting, image_size: int
) -> list[Contestant]:
    torch.manual_seed(0)
    x = at.noise(batch, 3, image_size, image_size, dtype=torch.float32)
    return [Contestant(name, _forward(each, x, at)) for name, each in networks.items()]


def network_cases(
    batch_sizes: Sequence[int] | None,
    settings: Sequence[Setting],
    *,
    compiled: bool = True,
    networks: Mapping[str, Entrant] | None = None,
    image_size: int = IMAGE_SIZE,
) -> list[Case]:
    """A case for each setting and batch, of the networks that also train against each other.

    Args:
        batch_sizes: images of a batch (default: `BATCH_SIZES`).
        settings: where and how precisely.
        compiled: whether networks also run under torch.compile.
        networks: contestants (default: `entrants` of the device).
        image_size: side of the images in pixels.

    Raises:
        UserError: a batch below 1.
    """
    found = []
    for at in settings:
        sizes = batch_sizes or BATCH_SIZES[at.device]
        _check_sizes(sizes)
        chosen = networks or entrants(at.device, compiled=compiled)
        found += [
            Case(
                at.claim("inference"),
                f"batch {size}",
                functools.partial(_network_contestants, chosen, size, at, image_size),
                at,
                memory=False,
            )
            for size in sizes
        ]
    return found


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """SE's price in our engine, and ours with SE against the fastest peer without, per case."""
    lines = []
    for case in dict.fromkeys(m.case for m in measurements):
        rows = [m for m in measurements if m.case == case]
        prices = [m for m in rows if m.contestant.startswith(f"{OURS} ")][1:]
        parts = []
        plain = ""
        if prices:
            plain = prices[0].contestant.removeprefix(f"{OURS} ")
            parts.append(f"SE costs {100 * (1 / prices[0].ratio - 1):+.1f}%")
        peers = [m for m in rows if not m.contestant.startswith("senet.")]
        without = [m for m in peers if m.contestant.endswith(f" {PEERS.get(plain, plain)}")]
        if without:
            best = min(without, key=lambda m: m.ratio)
            parts.append(f"{best.ratio:.2f}× as fast as the fastest plain peer ({best.contestant})")
        if peers:
            best = min(peers, key=lambda m: m.ratio)
            parts.append(f"{best.ratio:.2f}× as fast as the fastest peer ({best.contestant})")
        lines.append(f"{case}: senet.optimize: " + ", ".join(parts))
    return lines
