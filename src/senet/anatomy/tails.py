"""Tails: what follows a convolution's batch norm up to the next convolution, in whatever modules.

BN → act, BN → SE → add → act (section 3 of arXiv 1709.01507), BN → act → SE → conv (MBConv), and
the joined branches of an Inception module, concat → SE: the passes over memory that can become one.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from senet.anatomy.excitations import Anatomy, anatomy
from senet.anatomy.gate_function import activation_after
from senet.anatomy.graph import Node, Trace
from senet.anatomy.occurrences import Occurrence, name_of, products


@dataclass(frozen=True, eq=False)
class Part:
    """One step of a tail.

    Attributes:
        kind: "norm" (a batch norm), "affine" (a batch norm with its statistics worked in, such as
            torchvision's frozen one), "act", "se", "add", "cat".
        name: of the activation, by its values where it is known; name of the SE block; else "".
        module: dotted name of the innermost module around it, or of the SE block.
        node: the operation whose result this step ends with.
        passed: dotted names of modules that gave this very result on, doing nothing in evaluation
            mode: drop path, dropout, identity. In training they may not do nothing.
    """

    kind: str
    name: str
    module: str
    node: Node
    passed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name if self.kind == "act" else self.kind


@dataclass(frozen=True, eq=False)
class Tail:
    """The steps between two convolutions whose results nothing else reads.

    Attributes:
        parts: the steps in their order. The first is a norm, or a concatenation.
        source: what the first step reads; None for a concatenation.
        shortcut: of an addition the other summand; None without addition.
        shortcut_norm: a batch norm that this summand alone comes from, else None.
        branches: of a concatenation the tails that end in it, None for a map of another kind.
        readers: what reads the last result.
    """

    parts: tuple[Part, ...]
    source: Node | None
    shortcut: Node | None
    shortcut_norm: Part | None
    branches: tuple["Tail | None", ...]
    readers: tuple[Node, ...]

    @property
    def name(self) -> str:
        """Dotted name of the module of the first step."""
        return self.parts[0].module

    @property
    def form(self) -> str:
        """The steps by their names, and "conv" where a convolution alone reads the result."""
        alone = len(self.readers) == 1 and self.readers[0].kind == "conv"
        return " → ".join([*map(str, self.parts), *(["conv"] if alone else [])])

    @property
    def excitation(self) -> str | None:
        """Name of the SE block in it."""
        return next((part.module for part in self.parts if part.kind == "se"), None)


def tails(model: nn.Module, example_input: Any = None) -> tuple[Tail, ...]:
    """All tails of a model, in the order of execution.

    Args:
        model: any module, see `senet.anatomy.excitations`.
        example_input: likewise.

    Raises:
        UserError: as for `excitations`.
    """
    return read_tails(anatomy(model, example_input))


def read_tails(seen: Anatomy) -> tuple[Tail, ...]:
    """The tails in a forward pass that was read before."""
    return _Finder(seen.trace).run()


class _Finder:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        found = products(trace).values()
        self.blocks = {seen.map: seen for seen in found if isinstance(seen, Occurrence)}
        self.excited = {seen.end: seen.map for seen in self.blocks.values()}

    def run(self) -> tuple[Tail, ...]:
        firsts = [first for node in self.trace.nodes if (first := self.norm(node)) is not None]
        found = [self.follow(first) for first in firsts]
        ends = {tail.parts[-1].node: tail for tail in found}
        # Norms that are the shortcut of another tail.
        summed = {tail.shortcut_norm.node for tail in found if tail.shortcut_norm is not None}
        joined = [self.join(node, ends) for node in self.trace.nodes if self.joins(node)]
        inside = {id(branch) for tail in joined for branch in tail.branches}
        every = [
            tail
            for tail in (*found, *joined)
            if tail.parts[0].node not in summed and id(tail) not in inside
        ]
        return tuple(sorted(every, key=lambda tail: tail.parts[0].node.index))

    def norm(self, node: Node) -> Part | None:
        """The first step of a tail that begins here."""
        if node.name in ("batch_norm", "_native_batch_norm_legit_no_training") and node.positions:
            return self.part("norm", "", node)
        if node.kind == "add" and _by_channel(node) and node.sources[0].kind == "mul":
            scaled = node.sources[0]
            if _by_channel(scaled) and scaled.users == [node]:
                return self.part("affine", "", node)
        return None

    def follow(self, first: Part) -> Tail:
        """The tail that begins with this step."""
        source = next((s for s in first.node.sources if s.positions), None)
        if first.kind == "affine" and source is not None:
            source = source.sources[0]
        parts, shortcut, shortcut_norm = [first], None, None
        while (node := parts[-1].node) and not node.is_output:
            block = self.blocks.get(node)
            if block is not None and block.inside.issuperset(node.users):
                parts.append(self.part("se", "", block.end, name_of(block)))
                continue
            activation = activation_after(node)
            if activation is not None:
                parts.append(self.part("act", *activation))
                continue
            if len(node.users) != 1:
                break
            (user,) = node.users
            if user.kind == "add" and _sums_two(user) and shortcut is None:
                other = user.sources[user.sources[0] is node]
                if self.goes_on(other, user) > self.goes_on(node, user):
                    break  # this one is the shortcut of the other one's tail
                shortcut = other
                shortcut_norm = self.norm(other) if other.users == [user] else None
                parts.append(self.part("add", "", user))
            else:
                break
        readers = tuple(dict.fromkeys(parts[-1].node.users))
        return Tail(tuple(parts), source, shortcut, shortcut_norm, (), readers)

    def goes_on(self, summand: Node, total: Node) -> tuple[int, bool]:
        """Which of two summands' tails an addition belongs to: that with SE, else the first."""
        first = self.excited.get(summand, summand)
        rank = 0 if self.norm(first) is None else 1 + (first is not summand)
        return rank, total.sources[0] is summand

    def joins(self, node: Node) -> bool:
        """Whether SE scales a concatenation of channels, and nothing else reads it."""
        block = self.blocks.get(node)
        return node.kind == "cat" and block is not None and block.inside.issuperset(node.users)

    def join(self, node: Node, ends: dict[Node, Tail]) -> Tail:
        block = self.blocks[node]
        parts = (
            self.part("cat", "", node),
            self.part("se", "", block.end, name_of(block)),
        )
        branches = tuple(
            ends[source] if source in ends and source.users == [node] else None
            for source in node.sources
        )
        readers = tuple(dict.fromkeys(block.end.users))
        return Tail(parts, None, None, None, branches, readers)

    def part(self, kind: str, name: str, node: Node, module: str | None = None) -> Part:
        inner = next((call.name for call in reversed(node.calls) if call.name), "")
        passed = tuple(
            call.name for call in self.trace.owners(node) if call.name and node in call.inputs
        )
        return Part(kind, name, inner if module is None else module, node, passed)


def _by_channel(node: Node) -> bool:
    """Whether a map is scaled by, or added to, one constant for each of its channels."""
    if len(node.sources) != 1 or len(node.inputs) != 2 or node.channel_dim is None:
        return False
    (constant,) = (n for n in node.inputs if not n.moving)
    offset = len(node.shape) - len(constant.shape)
    wanted = [n if d == node.channel_dim else 1 for d, n in enumerate(node.shape)]
    return offset >= 0 and tuple(wanted[offset:]) == constant.shape


def _sums_two(node: Node) -> bool:
    a, b = node.sources if len(node.sources) == 2 else (node, node)
    return a is not b and a.shape == b.shape == node.shape
