"""Where SE belongs in a network that nobody has described: the paper's places, found in a trace.

Section 3 and 6.4 of the paper: the end of each residual branch before its addition (ResNet), the
output of each module after its concatenation (Inception). What has neither (VGG, MobileNet) gets
SE at the end of each block of conv-norm-activation units, see `conv_sites`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from senet.anatomy.graph import Call, Node, Trace
from senet.anatomy.occurrences import BRANCHES, Occurrence, name_of, products

_PASSED = ("dropout", "permute", "reshape", "same", "part")
_MOVED = ("permute", "reshape", "same")
_ACTIVATIONS = ("relu", "activation")
# What only forwards a map, or drops, or scales it by constants: SE stands before such a module.
_PASSING_CLASS = ("drop", "identity", "stochasticdepth", "layerscale")


@dataclass(frozen=True, eq=False)
class Site:
    """A place for an SE block.

    Attributes:
        call: module call whose output is scaled.
        node: that output.
        kind: "residual", "concat", "conv" or "named".
    """

    call: Call
    node: Node
    kind: str


@dataclass(frozen=True)
class Sites:
    """Places found, in the order of execution, and those given up with the reason."""

    found: tuple[Site, ...]
    skipped: tuple[tuple[str, str], ...]


def passes_through(module: nn.Module) -> bool:
    """Whether the module is a dropout, drop path, layer scale or identity."""
    name = type(module).__name__.lower()
    return any(part in name for part in _PASSING_CLASS)


def _scales_by_constants(node: Node) -> bool:
    return node.kind in ("mul", "div") and len(node.sources) == 1


def _back(node: Node) -> Node:
    """The operation whose output a branch ends with, before drop path, layer scale and views."""
    while len(node.sources) == 1 and (node.kind in _PASSED or _scales_by_constants(node)):
        node = node.sources[0]
    return node


def _candidates(base: Node, end: Node) -> list[Node]:
    """The nodes at which a branch's end may be scaled, the best first.

    Views that follow the last operation count as its output where they give (N,C,*). A functional
    activation belongs to no module; then the norm or convolution before it takes its place.
    """
    chain = [base]
    while chain[-1] is not end:
        following = [user for user in chain[-1].users if user.kind in _MOVED]
        if len(chain[-1].users) != 1 or not following:
            break
        chain.append(following[0])
    moved = [node for node in reversed(chain[1:]) if node.channel_dim == 1]
    before = base.sources[:1] if base.kind in _ACTIVATIONS and len(base.sources) == 1 else ()
    return [*moved, base, *before]


class _Finder:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.masks = trace.ancestors()
        self.products = products(trace)
        self.convs = sum(1 << node.index for node in trace.nodes if node.kind == "conv")
        self.resizes = sum(1 << n.index for n in trace.nodes if n.kind in ("resize", "deconv"))

    def nodes_in(self, mask: int) -> Iterator[Node]:
        """The nodes of a bit mask."""
        while mask:
            low = mask & -mask
            yield self.trace.nodes[low.bit_length() - 1]
            mask ^= low

    def branch(self, node: Node) -> tuple[Node, int] | None:
        """The residual branch that ends in this addition, with the mask of its nodes.

        One summand is the other's ancestor (identity), or both come from the same map and one
        takes more convolutions (the branch) than the other (at most one: a projection). Sums of
        maps that were resized, as in pyramids and decoders, are none.
        """
        if node.kind != "add" or len(node.sources) != 2 or not node.is_map:
            return None
        a, b = node.sources
        if a is b or a.shape != b.shape or a.channel_dim is None:
            return None
        common = self.masks[a.index] & self.masks[b.index]
        if not common:
            return None
        own = {n: self.masks[n.index] & ~common for n in (a, b)}
        if (own[a] | own[b]) & self.resizes or self._different_parts(own[a], own[b]):
            return None
        counts = {n: (own[n] & self.convs).bit_count() for n in (a, b)}
        branch, shortcut = (a, b) if counts[a] >= counts[b] else (b, a)
        if counts[branch] == counts[shortcut] or counts[shortcut] > 1:
            return None
        return branch, own[branch]

    def _different_parts(self, a: int, b: int) -> bool:
        """Whether two paths begin with different parts of one map (the groups of a Res2Net)."""
        starts = [next(iter(self.nodes_in(mask)), None) for mask in (a, b)]
        return all(node is not None and node.kind == "part" for node in starts) and (
            starts[0].sources == starts[1].sources  # type: ignore[union-attr]
        )

    def attention_in(self, nodes: Iterable[Node]) -> str | None:
        """Name of an SE block (or a choice between branches by channel) among these nodes."""
        for node in nodes:
            seen = self.products.get(node)
            if isinstance(seen, Occurrence):
                return name_of(seen)
            if seen == BRANCHES:
                return f"{node.calls[-1].name} ({type(node.calls[-1].module).__name__})"
        return None

    def owner(
        self, nodes: Iterable[Node], wanted: set[Node], *, for_one_block: bool = True
    ) -> tuple[Call, Node] | str:
        """The innermost module that returns one of the nodes and nothing else; or why none does.

        Args:
            nodes: outputs to be scaled, the best first.
            wanted: what the module may return in its other calls.
            for_one_block: whether one SE block has to fit all calls.
        """
        why = "no module returns this map"
        for node in nodes:
            for call in self.trace.owners(node):
                if passes_through(call.module) or not call.name:
                    continue
                others = [c for c in self.trace.calls_of(call.module) if c.output not in wanted]
                if others:
                    why = f"{call.name} is called {len(others) + 1} times, also where no SE belongs"
                elif for_one_block and (unlike := _unlike(self.trace, call)):
                    why = f"{call.name} {unlike}"
                else:
                    return call, node
        return why


def _unlike(trace: Trace, call: Call) -> str | None:
    """Why one SE block cannot scale what a module returns in all its calls; None if it can."""
    maps = [each.output for each in trace.calls_of(call.module)]
    nodes = [node for node in maps if node is not None and node.is_map]
    if len(nodes) < len(maps):
        return "does not return one feature map (N,C,*) in each of its calls"
    if len({len(node.shape) for node in nodes}) > 1:
        return "is called with maps of several numbers of dimensions"
    dimensions = [channel_dimension(node) for node in nodes]
    if len(set(dimensions)) > 1:
        return "is called with maps whose channels stand in several dimensions"
    counts = {node.shape[d] for node, d in zip(nodes, dimensions, strict=True)}
    if len(counts) > 1:
        several = ", ".join(map(str, sorted(counts)))
        return f"is called with maps of several channel numbers ({several})"
    return None


def channel_dimension(node: Node) -> int:
    """Where the channels of a map stand, 1 where nothing tells."""
    return 1 if node.channel_dim is None else node.channel_dim


def _described(node: Node) -> str:
    inside = next((call.name for call in reversed(node.calls) if call.name), "the model")
    return f"{node.kind} in {inside}"


class Refused(Exception):  # noqa: N818 - an answer, which `insert` words
    """A place has an SE block already; the argument names the block."""


def residual_sites(trace: Trace) -> tuple[Sites, int]:
    """Ends of residual branches, and the mask of the nodes inside of any of them."""
    finder = _Finder(trace)
    inside, ends = 0, []
    for node in trace.nodes:
        branch = finder.branch(node)
        if branch is not None:
            end, mask = branch
            inside |= mask
            ends.append((end, _candidates(_back(end), end), mask))
    wanted = {node for _, nodes, _ in ends for node in nodes}
    found, skipped = [], []
    for end, nodes, mask in ends:
        present = finder.attention_in(finder.nodes_in(mask))
        if present is not None:
            raise Refused(present)
        owner = finder.owner(nodes, wanted)
        if isinstance(owner, str):
            skipped.append((_described(end), owner))
        else:
            found.append(Site(*owner, "residual"))
    return Sites(tuple(found), tuple(skipped)), inside


def branch_ends(trace: Trace) -> list[Site]:
    """Ends of residual branches, SE blocks included, that a module returns."""
    finder = _Finder(trace)
    chains = []
    for node in trace.nodes:
        if (branch := finder.branch(node)) is not None:
            end = branch[0]
            base = _back(end)
            # Not the norm before a functional activation, whose map is another one.
            chains.append([each for each in _candidates(base, end) if each.index >= base.index])
    wanted = {node for chain in chains for node in chain}
    owners = (finder.owner(chain, wanted, for_one_block=False) for chain in chains)
    return [Site(*owner, "residual") for owner in owners if not isinstance(owner, str)]


def concat_sites(trace: Trace, excluded: int = 0) -> Sites:
    """Outputs of modules that end by joining the channels of convolutions of theirs.

    Args:
        trace: the forward pass.
        excluded: mask of nodes to leave out: what lies inside a residual branch ends elsewhere.
    """
    finder = _Finder(trace)
    found, skipped = [], []
    for node in trace.nodes:
        if node.kind != "cat" or excluded >> node.index & 1 or not _joins_channels(node):
            continue
        ends = [node]
        while len(ends[-1].users) == 1 and ends[-1].users[0].kind in _MOVED:
            ends.append(ends[-1].users[0])
        for end in reversed(ends):
            call = next((c for c in trace.owners(end) if c.name and _convolves(trace, c)), None)
            if call is not None and end.is_map:
                inner = [n for n in trace.nodes if n.within(call)]
                present = finder.attention_in(inner)
                if present is not None:
                    raise Refused(present)
                if unlike := _unlike(trace, call):
                    skipped.append((_described(end), f"{call.name} {unlike}"))
                else:
                    found.append(Site(call, end, "concat"))
                break
    return Sites(tuple(found), tuple(skipped))


def _joins_channels(node: Node) -> bool:
    parts = node.sources
    return (
        node.is_map
        and node.channel_dim is not None
        and len(parts) > 1
        and all(part.channel_dim == node.channel_dim for part in parts)
        and sum(part.channels for part in parts) == node.channels
    )


def _convolves(trace: Trace, call: Call) -> bool:
    return any(node.kind == "conv" and node.within(call) for node in trace.nodes)


def conv_sites(trace: Trace) -> Sites:
    """Ends of blocks of convolution-norm-activation units.

    A block ends where the next thing is not a convolution at the same resolution (a pooling, a
    stride, a fork), and after the pointwise half of a depthwise separable convolution. A stem or
    patch embedding that strides is none, nor is the last layer of the head.
    """
    finder = _Finder(trace)
    ends: dict[Node, list[Node]] = {}
    unit_of: dict[Node, Node] = {}
    later = 0  # nodes that some convolution or linear layer reads
    for node in trace.nodes:
        if node.kind in ("conv", "linear") and node.sources:
            later |= finder.masks[node.index] & ~(1 << node.index)
    for conv in trace.nodes:
        if conv.kind != "conv" or not conv.is_map or set(conv.places) == {1}:
            continue
        chain = [conv]
        for kinds in (("norm",), ("add",), _ACTIVATIONS):
            while len(chain[-1].users) == 1 and chain[-1].users[0].kind in kinds:
                chain.append(chain[-1].users[0])
                if kinds != ("add",):
                    break  # but parallel convolutions that are added (RepVGG) are one unit
        end = chain[-1]
        unit_of[end] = conv
        stem = conv.stride > 1 and all(node.kind == "input" for node in conv.sources)
        if stem or not later >> end.index & 1:
            continue
        source = _back(conv.sources[0]) if conv.sources else None
        separable = source in unit_of and _depthwise(unit_of[source]) and not _depthwise(conv)
        users = [user for user in end.users if user.kind != "dropout"]
        goes_on = len(users) == 1 and users[0].kind == "conv" and users[0].stride == 1
        if separable or not goes_on:
            ends[end] = list(reversed(chain))
    wanted = {node for nodes in ends.values() for node in nodes}
    found, skipped = [], []
    for end, nodes in ends.items():
        present = finder.attention_in([*nodes, *end.users])
        if present is not None:
            raise Refused(present)
        owner = finder.owner(nodes, wanted)
        if isinstance(owner, str):
            skipped.append((_described(end), owner))
        else:
            found.append(Site(*owner, "conv"))
    return Sites(tuple(found), tuple(skipped))


def _depthwise(conv: Node) -> bool:
    return conv.groups > 1 and conv.sources[0].channels == conv.groups


def automatic_sites(trace: Trace) -> Sites:
    """Residual branches and concatenations; where there is neither, blocks of convolutions."""
    residual, inside = residual_sites(trace)
    concat = concat_sites(trace, inside)
    both = (*residual.found, *concat.found)
    if not both:
        conv = conv_sites(trace)
        return Sites(conv.found, (*residual.skipped, *concat.skipped, *conv.skipped))
    return Sites(both, (*residual.skipped, *concat.skipped))


def named_sites(trace: Trace, modules: Mapping[str, nn.Module]) -> Sites:
    """The outputs of these modules, by name; the reason for each that returns no map."""
    finder = _Finder(trace)
    found, skipped = [], []
    for name, module in modules.items():
        calls = trace.calls_of(module)
        nodes = [call.output for call in calls if call.output is not None and call.output.is_map]
        if not calls:
            skipped.append((name, "it is not called in a forward pass"))
        elif not nodes:
            skipped.append((name, "it does not return one feature map (N,C,*)"))
        elif (present := finder.attention_in(nodes)) is not None:
            raise Refused(present)
        elif unlike := _unlike(trace, calls[0]):
            skipped.append((name, f"it {unlike}"))
        else:
            found.append(Site(calls[0], nodes[0], "named"))
    return Sites(tuple(found), tuple(skipped))


def unique(sites: Iterable[Site]) -> list[Site]:
    """One site a module, in the order of execution."""
    seen: dict[int, Site] = {}
    for site in sorted(sites, key=lambda site: site.node.index):
        seen.setdefault(id(site.call.module), site)
    return list(seen.values())


def stages_of(sites: Iterable[Site]) -> list[int]:
    """Stage of each site: sites in a row whose maps have the same size share one.

    Numbered from 2, the stem being stage 1 as in the paper's ResNets.
    """
    numbers: list[int] = []
    before: tuple[int, ...] | None = None
    number = 1
    for site in sites:
        if site.node.places != before:
            number, before = number + 1, site.node.places
        numbers.append(number)
    return numbers
