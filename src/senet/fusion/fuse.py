"""Any network's tails and SE blocks through the operator: `fuse`, `unfuse`, and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from senet.anatomy.example import guessed_arguments
from senet.anatomy.excitations import Anatomy, anatomy
from senet.anatomy.graph import Call, Trace
from senet.anatomy.recording import run
from senet.anatomy.tails import Part as Step
from senet.anatomy.tails import Tail, read_tails
from senet.errors import SenetError, UserError
from senet.fusion.forward import FusedForward, fused_forwards
from senet.fusion.modules import Gate, gate_of, is_depthwise, is_norm, is_three_by_three
from senet.fusion.rewriting import ALONE, DEPTHWISE, THREE_BY_THREE, Part, Plan
from senet.fusion.state import ModuleState, RandomState
from senet.fusion.tracing import Ran, Unreadable
from senet.nn.block import SqueezeExcitation
from senet.nn.hooks import scaling_block

# Passes over a map, forward and backward, of the modules one by one: docs/fusion.md.
_PASSES = {"norm": 8, "act": 5, "se": 12, "add": 3}
_BY_RESULT = ("relu", "relu6", "leaky_relu")  # whose gradients need no input
# How far outputs may be from those before, relative to their largest: rounding, which grows with
# the layers. A map in half precision is rounded by up to 5e-4 each time, in bfloat16 by 4e-3.
_CLOSE = {torch.float16: 5e-2, torch.bfloat16: 2e-1}
_ELSE_CLOSE = 1e-3
_OURS = "it is ours and runs in the operator"


@dataclass(frozen=True)
class Fused:
    """A tail, an SE block or a convolution that runs in the operator.

    Attributes:
        name: dotted name of its batch norm; of the SE block where that is alone; of a convolution.
        owner: of the module whose forward was written anew.
        form: its steps: "norm → silu → se", "norm → se → add → relu", "se", …; or "depthwise" and
            "3×3 convolution".
        bytes_moved: memory traffic saved in a training step, for one image of the example.
        bytes_kept: maps that the backward pass no longer keeps, likewise.
    """

    name: str
    owner: str
    form: str
    bytes_moved: int
    bytes_kept: int


@dataclass(frozen=True)
class Left:
    """What runs as before.

    Attributes:
        name: dotted name of the batch norm, or of the SE block.
        form: its steps.
        reason: why.
    """

    name: str
    form: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did.

    Attributes:
        fused: what runs in the operator now.
        left: what does not, with the reason.
    """

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]

    @property
    def bytes_moved(self) -> int:
        """Memory traffic saved in a training step, for one image of the example's size."""
        return sum(part.bytes_moved for part in self.fused)

    @property
    def bytes_kept(self) -> int:
        """Bytes of maps that the backward pass no longer keeps, for one such image."""
        return sum(part.bytes_kept for part in self.fused)

    def __str__(self) -> str:
        forms: dict[str, int] = {}
        for part in self.fused:
            forms[part.form] = forms.get(part.form, 0) + 1
        lines = [f"{count} × {form}" for form, count in sorted(forms.items(), key=lambda f: -f[1])]
        reasons: dict[tuple[str, str], list[str]] = {}
        for rest in self.left:
            reasons.setdefault((rest.form, rest.reason), []).append(rest.name)
        for (form, reason), names in reasons.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left: {names[0]}{others} ({form}): {reason}")
        moved, kept = self.bytes_moved / 1e6, self.bytes_kept / 1e6
        lines.append(f"a step moves {moved:.0f} MB less, and keeps {kept:.0f} MB less, an image")
        return "\n".join(lines)


def fuse(model: nn.Module, example_input: Any = None) -> FusionReport:
    """Run the tails and SE blocks of a live model through the operator, in place.

    Batch norm, activation, SE, addition and activation between two convolutions become one call of
    `senet.ops`, in training and evaluation; depthwise convolutions with kernels of 5 and 7 run in
    `senet.ops.depthwise`, plain ones of 3×3 in `senet.ops.convolution` where that is faster. The
    module tree, names, parameters, state dict, hooks, optimizers and copies stay as they are;
    outputs and gradients change by rounding only, random numbers not at all. Where a module inside
    has hooks, its block runs as before, which is said once.

    Fuse before `torch.compile`, `DistributedDataParallel` and `fully_shard`, or give the module in
    them; `unfuse` undoes it.

    Args:
        model: any network, of timm, torchvision, transformers or one's own.
        example_input: what it is called with, a tuple for several arguments; None for zeros of the
            size that the model says.

    Returns:
        What was fused, what was left, and why.

    Raises:
        UserError: the model cannot be run on the example, or is compiled or replicated.
        SenetError: the outputs differ; the model is then as it was.
    """
    root = _inner(model)
    unfuse(root)
    state, numbers = ModuleState(root), RandomState()
    try:
        return _fused(root, example_input)
    except BaseException:
        unfuse(root)
        raise
    finally:
        state.restore()
        numbers.restore()


def _fused(root: nn.Module, example_input: Any) -> FusionReport:
    seen, arguments = _seen(root, example_input)
    gates = {n: gate_of(root, block, seen.trace) for n, block in seen.excitations.items()}
    known = {name: gate for name, gate in gates.items() if isinstance(gate, Gate)}
    tails = list(_single(read_tails(seen)))
    plans, unread = _plans(root, tails, known)
    failed: dict[str, str] = {}
    covered: set[str] = set()
    for name in sorted(plans, key=lambda name: name.count(".") + bool(name)):
        if name in covered:
            continue
        opened = _with_inner(name, plans)
        problem = _rewritten(root, name, seen.trace, opened, known)
        failed |= problem
        if not problem:
            covered |= {_joined(name, inner) for inner in opened}
    inside = {block for name, _, f in fused_forwards(root) for block in _blocks(name, f)}
    for name in known:
        if isinstance(seen.excitations[name].module, SqueezeExcitation):
            failed[name] = _OURS
        elif name not in inside:
            failed |= _rewritten(root, name, seen.trace, frozenset(), known)
    called = {call.name for call in seen.trace.calls}
    readers = set(_readers(root, tails).values())
    for name, module in root.named_modules():
        convolves = is_depthwise(module) or is_three_by_three(module)
        if name in readers or (name in called and convolves and not _is_ours(root, name)):
            reads = name in readers
            failed |= _rewritten(root, name, seen.trace, frozenset(), {}, reads=reads)
    _check(root, seen, arguments)
    return _report(root, seen, tails, gates, {**failed, **unread})


def unfuse(model: nn.Module) -> None:
    """Give all modules of a model their own forwards back, which `fuse` replaced."""
    for _, module, _ in list(fused_forwards(model)):
        del module.__dict__["forward"]


def _inner(model: nn.Module) -> nn.Module:
    """The network in a wrapper.

    Raises:
        UserError: a wrapper whose copies the fused forwards would not follow.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    if isinstance(model, nn.DataParallel):
        raise UserError("fuse cannot follow nn.DataParallel; use DistributedDataParallel")
    if type(model).__name__ == "OptimizedModule":
        raise UserError("the model is compiled; call senet.fuse first, then torch.compile")
    return model


def _seen(root: nn.Module, example: Any) -> tuple[Anatomy, tuple[Any, ...]]:
    """What the model consists of, and the arguments that showed it."""
    *guesses, last = guessed_arguments(root, example)
    for arguments in guesses:
        with suppress(UserError):
            return anatomy(root, arguments), arguments
    return anatomy(root, last), last


def _single(tails: Sequence[Tail]) -> Iterator[Tail]:
    """Tails that begin with a norm, those in a concatenation too."""
    for tail in tails:
        if tail.parts[0].kind == "cat":
            yield from (branch for branch in tail.branches if branch is not None)
        else:
            yield tail


def _plans(
    root: nn.Module, tails: Sequence[Tail], gates: dict[str, Gate]
) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """Modules to write anew, each with those to open in it; tails that have none, and why."""
    plans: dict[str, frozenset[str]] = {}
    unread: dict[str, str] = {}
    for tail in tails:
        first = tail.parts[0]
        if first.kind == "affine":
            unread[tail.name] = "its statistics are constants"
            continue
        steps = _steps(tail, gates)
        chains = [_chain(step, gates) for step in steps]
        if not chains[0] or not isinstance(chains[0][-1].module, _BatchNorm):
            unread[tail.name] = "its batch norm is no module"
            continue
        norm = chains[0][-1].module
        if not is_norm(norm):
            unread[tail.name] = f"the batch norm {type(norm).__name__}"
            continue
        depth = min(map(len, chains))
        while any(chain[depth - 1] is not chains[0][depth - 1] for chain in chains):
            depth -= 1
        owner = chains[0][depth - 1]
        squeezed = any(step.kind == "se" for step in steps)
        if squeezed and depth > 1 and scaling_block(owner.module) is not None:  # by its hook
            depth -= 1
            owner = chains[0][depth - 1]
        if type(owner.module).__module__.startswith("senet.") and len(chains) > 1:
            unread[tail.name] = _OURS
            continue
        names = _names_in(owner.module)
        inner = [call for c in chains for call in c[depth:]]
        if any(call.module not in names for call in inner):
            unread[tail.name] = f"a part of it is no module inside of {type(owner.module).__name__}"
            continue
        opened = {names[call.module] for c in chains for call in c[depth:-1]}
        ends = {names[c[-1].module]: c[-1] for c in chains if len(c) > depth}
        functional = {n for n, c in ends.items() if next(c.module.children(), None) is not None}
        units = {n for n, c in ends.items() if n not in opened and is_norm(c.module)}
        units |= {n for n, c in ends.items() if c.name in gates}
        opened |= functional - units
        plans[owner.name] = plans.get(owner.name, frozenset()) | opened
    return plans, unread


def _names_in(owner: nn.Module) -> dict[nn.Module, str]:
    """The names of modules within another one; a shared module has others outside of it."""
    every = list(owner.named_modules(remove_duplicate=False))
    return {module: name for name, module in reversed(every)}


def _with_inner(name: str, plans: dict[str, frozenset[str]]) -> frozenset[str]:
    """What to open in a module, and in those that are opened."""
    found: set[str] = set()
    new = set(plans[name])
    while new:
        found |= new
        new = {
            _joined(inner, deeper)
            for inner in new
            for deeper in plans.get(_joined(name, inner), frozenset())
        } - found
    return frozenset(found)


def _steps(tail: Tail, gates: dict[str, Gate]) -> list[Step]:
    """The steps that the operator could take, from the norm on."""
    steps = []
    for part in tail.parts:
        if part.kind == "se" and part.module not in gates:
            break
        steps.append(part)
    if tail.shortcut_norm is not None and any(part.kind == "add" for part in steps):
        steps.append(tail.shortcut_norm)
    return steps


def _chain(step: Step, gates: dict[str, Gate]) -> list[Call]:
    """The module calls around a step, from the model down to the norm or block that it is."""
    chain: list[Call] = []
    for call in step.node.calls:
        chain.append(call)
        if is_norm(call.module) or (call.name in gates and step.kind == "se"):
            break
    return chain


def _readers(root: nn.Module, tails: Sequence[Tail]) -> dict[str, str]:
    """By fused tail whose result is computed once more the convolution that alone reads it.

    Only behind activations of which the modules keep the result alone: any other tail saves the
    activation's input by being fused, and a third exponential of each element costs time.
    """
    found: dict[str, str] = {}
    parts = {name: part for _, name, part in _parts(root)}
    for tail in tails:
        part = parts.get(tail.name)
        if part is None or part.form.count("→") + 1 < len(tail.parts):
            continue
        if "add" in part.form or part.form.split(" → ")[1] not in _BY_RESULT:
            continue
        innermost = [next(reversed(node.calls)) for node in tail.readers if node.calls]
        if len(tail.readers) == 1 and innermost and type(innermost[0].module) is nn.Conv2d:
            found[tail.name] = innermost[0].name
    return found


def _parts(root: nn.Module) -> Iterator[tuple[str, str, Part]]:
    """What runs in the operator: owner, dotted name of its norm (or of SE alone), and form."""
    for owner, _, forward in fused_forwards(root):
        assert forward.rewritten is not None
        for part in forward.rewritten.parts:
            inner = part.norm if part.norm is not None else part.block or ""
            yield owner, _joined(owner, inner), part


def _rewritten(
    root: nn.Module,
    name: str,
    trace: Trace,
    opened: frozenset[str],
    gates: dict[str, Gate],
    *,
    reads: bool = False,
) -> dict[str, str]:
    """Write a module's forward anew; where that fails, its name and the reason."""
    module = root.get_submodule(name)
    prefix = f"{name}." if name else ""
    within = {n.removeprefix(prefix): g for n, g in gates.items() if n.startswith(prefix)}
    if name in gates:
        within = {"": gates[name]}
    try:
        norms = frozenset(n for m, n in _names_in(module).items() if m in _norms_of_maps(trace))
        ran = next((Ran(trace, c) for c in trace.calls if c.name == name and not c.number), None)
        forward = FusedForward(module, Plan(opened, within, reads, norms), ran)
        if (obstacle := forward.obstacle()) is not None:
            return {name: obstacle}
        module.__dict__["forward"] = forward
    except Unreadable as why:
        return {name: str(why) if is_norm(module) else f"{type(module).__name__}: {why}"}
    return {}


def _norms_of_maps(trace: Trace) -> set[nn.Module]:
    """Batch norms that were given maps and nothing else, such as vectors behind a linear layer."""
    norms = [call for call in trace.calls if is_norm(call.module)]
    others = {call.module for call in norms if not all(node.positions for node in call.inputs)}
    return {call.module for call in norms} - others


def _is_ours(root: nn.Module, name: str) -> bool:
    """Whether a module stands in one of this package, which calls our kernels itself."""
    holder = root.get_submodule(name.rpartition(".")[0])
    return type(holder).__module__.startswith("senet.")


def _blocks(owner: str, forward: FusedForward) -> set[str]:
    """Dotted names of the SE blocks that a forward contains."""
    assert forward.rewritten is not None
    names = (part.block for part in forward.rewritten.parts if part.block is not None)
    return {_joined(owner, name) for name in names}


def _joined(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner


def _check(root: nn.Module, seen: Anatomy, arguments: tuple[Any, ...]) -> None:
    """Raise where outputs on the example are not what they were.

    Raises:
        SenetError: they differ.
    """
    kinds = {node.dtype for node in seen.trace.nodes}
    close = max(_CLOSE.get(kind, _ELSE_CLOSE) for kind in kinds)
    before, after = tree_leaves(seen.trace.result), tree_leaves(run(root, arguments))
    pairs = [(b, a) for b, a in zip(before, after, strict=False) if isinstance(b, Tensor)]
    off = max((_difference(b, a) for b, a in pairs), default=0.0)
    if len(before) != len(after) or not off <= close:
        raise SenetError(f"fused, {type(root).__name__} gives outputs that differ by {off:.1e}")


def _difference(before: Tensor, after: Any) -> float:
    """The largest, relative to the largest number before; NaN where one of two is, or a shape."""
    if not isinstance(after, Tensor) or after.shape != before.shape:
        return float("nan")
    if not before.is_floating_point() or not before.numel():
        return 0.0
    same = (before == after) | (before.isnan() & after.isnan())
    off = torch.where(same, 0.0, (after - before).abs().double()).max()
    scale = torch.where(before.isfinite(), before, 0.0).abs().max().double().clamp_min(1e-30)
    return float(off / scale)


def _report(
    root: nn.Module,
    seen: Anatomy,
    tails: Sequence[Tail],
    gates: dict[str, Gate | str],
    reasons: dict[str, str],
) -> FusionReport:
    sizes = {tail.name: _bytes(tail.parts[0]) for tail in tails}
    sizes |= {
        name: _bytes(Step("se", "", name, block.occurrences[0].product))
        for name, block in seen.excitations.items()
    }
    fused: list[Fused] = []
    placed = {name for name, _, _ in fused_forwards(root)}
    again = {tail for tail, reader in _readers(root, tails).items() if reader in placed}
    for owner, name, part in _parts(root):
        moved, kept = _saved(part.form, again=name in again)
        size = sizes.get(name, 0)
        fused.append(Fused(name, owner, part.form, moved * size, kept * size))
    done = {part.name for part in fused}
    done |= {b for name, _, f in fused_forwards(root) for b in _blocks(name, f)}
    left = []
    for tail in tails:
        if tail.name not in done:
            form = " → ".join(map(str, tail.parts))
            why = gates.get(tail.excitation or "")
            squeezed = f"its SE block: {why}" if isinstance(why, str) else ""
            left.append(Left(tail.name, form, squeezed or _reason(tail, form, reasons)))
    for name, gate in gates.items():
        if name not in done:
            left.append(Left(name, "se", gate if isinstance(gate, str) else reasons.get(name, "")))
    order = {name: i for i, name in enumerate(sizes)}
    fused.sort(key=lambda part: order.get(part.name, len(order)))
    return FusionReport(tuple(fused), tuple(left))


def _reason(tail: Tail, form: str, reasons: dict[str, str]) -> str:
    """Why a tail was left."""
    if form == "norm":
        return ALONE
    for name in (tail.name, *(call.name for call in reversed(tail.parts[0].node.calls))):
        if name in reasons:
            return reasons[name]
    return "the operator does not have this form, or a module between its steps is random"


def _bytes(step: Step) -> int:
    """Of one image's map."""
    node = step.node
    return prod(node.shape[1:]) * torch.empty(0, dtype=node.dtype).element_size()


def _saved(form: str, *, again: bool) -> tuple[int, int]:
    """How many times a map no longer moves, and is no longer kept; `again`: computed once more."""
    if form in (DEPTHWISE, THREE_BY_THREE):
        return 0, 0
    steps = form.split(" → ")
    apart = sum(_PASSES.get(step, _PASSES["act"]) for step in steps)
    together = 5 if steps == ["se"] else 8
    if "add" in steps:
        together = 9 if steps[-1] == "add" else 11
    by_result = (*_BY_RESULT, "add", "se")
    kept = (
        again
        + ("add" in steps and steps[-1] not in by_result)
        + ("se" in steps and "norm" in steps)
        + (len(steps) > 1 and steps[1] not in by_result)
    )
    return max(apart - together - 2 * again, 0), kept
