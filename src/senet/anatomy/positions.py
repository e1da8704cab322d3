"""Which dimensions of a tensor hold the positions of a map, and where a reduction ends them.

The one thing that tells an SE block from any other product: its gates depend on a map only through
a reduction over all its positions. So each operation says which dimensions of its result still run
over positions. Sizes alone cannot tell: a map of 1×1 positions is a map, and gates that were
expanded to a map's size are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from senet.anatomy.graph import Node

REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "logsumexp", "prod"),
    *("nanmean", "nansum", "median", "vector_norm", "linalg_vector_norm", "var_mean", "std_mean"),
)
POOLS = ("avg_pool", "max_pool", "lp_pool")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view")
_SWAPS = ("transpose", "swapaxes", "swapdims", "t", "mT")
_MATMULS = ("matmul", "bmm", "mm", "__matmul__")
# Kernels up to this size are local windows, whatever the size of the map in this very run.
_LARGEST_WINDOW = 3


def reads_positions(node: Node) -> tuple[tuple[int, ...], bool]:
    """The dimensions of a new node that hold positions, and whether it is `reduced`.

    What depends on positions in a way that is not understood keeps them: no SE block is seen where
    there is none.
    """
    if node.kind == "input":
        first = 2 if node.dtype.is_floating_point else 1
        return tuple(range(first, len(node.shape))), False
    reduced = any(source.reduced for source in node.sources)
    if not any(source.positions for source in node.sources):
        if node.kind in ("conv", "deconv") and not reduced:  # of an input without a map: makes one
            return tuple(range(2, len(node.shape))), False
        if node.kind == "deconv" and node.shape[2:] != node.sources[0].shape[2:]:
            return tuple(range(2, len(node.shape))), False
        return (), reduced
    left = _left(node)
    if left is None:  # a single position was picked: no reduction, and no map any more
        return (), False
    return tuple(sorted(left)), not left


def _left(node: Node) -> set[int] | None:
    """The positions of a node one of whose sources has some."""
    name, source = node.name, next(s for s in node.sources if s.positions)
    mapped = set(source.positions)
    rank = len(source.shape)
    if name in REDUCTIONS and len(node.inputs) == 1:  # not max(a, b)
        return _reduced(node, source)
    if name.lstrip("_").startswith(("adaptive_", *POOLS)):
        return _pooled(node, source)
    if node.kind in ("conv", "deconv"):
        return _convolved(node)
    if name in _MATMULS:
        return _multiplied(node)
    if name == "einsum":
        return _summed(node)
    if name == "scaled_dot_product_attention":
        query = node.args[0] if node.args else node.kwargs["query"]
        return set(query.positions)
    if name in _VIEWS:
        return _regrouped(source.shape, mapped, node.shape)
    if name == "permute":
        order = [d % rank for d in _integers(node.args[1:] or list(node.kwargs.values()))]
        return {order.index(d) for d in mapped} if len(order) == rank else _all(node)
    if name in _SWAPS:
        pair = [d % rank for d in _integers((node.args[1:], *node.kwargs.values()))] or [
            rank - 2,
            rank - 1,
        ]
        swap = {pair[0]: pair[1], pair[1]: pair[0]}
        return {swap.get(d, d) for d in mapped}
    if name in ("movedim", "moveaxis"):
        order = moved_order(node, rank)
        return {order.index(d) for d in mapped}
    if name == "unsqueeze":
        (at,) = _integers((node.args[1:], *node.kwargs.values()))
        return {d + (d >= at % (rank + 1)) for d in mapped}
    if name == "squeeze":
        return _squeezed(node, source)
    if name in ("unbind", "select"):
        (at, *_) = [*_integers((node.args[1:], *node.kwargs.values())), 0]
        return _dropped(mapped, {at % rank})
    if name == "__getitem__":
        return _indexed(node, source)
    if name == "stack":
        numbers = [v for v in (*node.args[1:], *node.kwargs.values()) if isinstance(v, int)]
        at = (numbers or [0])[0] % len(node.shape)
        return {d + (d >= at) for s in node.sources for d in s.positions}
    if name == "embedding":
        return mapped
    aligned = [
        {d + len(node.shape) - len(s.shape) for d in s.positions}
        for s in node.sources
        if len(s.shape) <= len(node.shape)
    ]
    if len(aligned) == len(node.sources):  # elementwise, broadcast, concatenated, padded, …
        return set().union(*aligned)
    return _all(node)


def _all(node: Node) -> set[int]:
    return set(range(1, len(node.shape))) or {0}


def _integers(values: Any) -> list[int]:
    """All integers among nested arguments, in order."""
    if isinstance(values, bool):
        return []
    if isinstance(values, int):
        return [values]
    if isinstance(values, Iterable) and not isinstance(values, str):
        return [number for value in values for number in _integers(value)]
    return []


def _dropped(mapped: set[int], gone: set[int]) -> set[int] | None:
    """Dimensions taken out of the shape by picking one index of each; None: no position is left."""
    left = {d - sum(g < d for g in gone) for d in mapped - gone}
    return left or None


def _reduced(node: Node, source: Node) -> set[int]:
    rank = len(source.shape)
    named = [node.kwargs[key] for key in ("dim", "axis") if key in node.kwargs]
    at = 2 if node.name.endswith("norm") else 1  # behind the order of the norm
    values = named or list(node.args[at : at + 1])
    dims = {d % rank for d in _integers(values)} or set(range(rank))
    left = set(source.positions) - dims
    if len(node.shape) == rank:
        return left
    return {d - sum(gone < d for gone in dims) for d in left}


def _pooled(node: Node, source: Node) -> set[int]:
    mapped = set(source.positions)
    if node.name.lstrip("_").startswith("adaptive_"):
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        wanted = sizes if isinstance(sizes, Sequence) else [sizes]
        spatial = range(len(node.shape) - _dims(node.name), len(node.shape))
        wanted = list(wanted) * len(spatial) if len(wanted) == 1 else list(wanted)
        return mapped - {d for d, size in zip(spatial, wanted, strict=True) if size == 1}
    kernel = node.args[1] if len(node.args) > 1 else node.kwargs.get("kernel_size")
    return _windowed(node, source, kernel)


def _dims(name: str) -> int:
    return int(next(letter for letter in name if letter.isdigit()))


def _windowed(node: Node, source: Node, kernel: Any) -> set[int]:
    """Positions behind a window that slides, or that covers the whole map and ends them."""
    mapped = set(source.positions)
    sizes = [source.shape[d] for d in sorted(mapped)]
    window = _integers(kernel)
    window = window * len(sizes) if len(window) == 1 else window
    whole = (
        window == sizes
        and max(window, default=0) > _LARGEST_WINDOW
        and all(node.shape[d] == 1 for d in mapped)
    )
    return set() if whole else mapped


def _convolved(node: Node) -> set[int]:
    source, weight = node.inputs[:2]
    depthwise = source.moving and node.groups == source.shape[1] > 1
    if depthwise and not _windowed(node, source, weight.shape[2:]):
        return set()  # over the whole map: a weighted mean
    return set(range(2, len(node.shape)))


def _multiplied(node: Node) -> set[int]:
    a, b = node.inputs[:2]
    rank = len(node.shape)
    found = {d + rank - len(a.shape) for d in a.positions if d != len(a.shape) - 1}
    found |= {d + rank - len(b.shape) for d in b.positions if d != len(b.shape) - 2}
    return found


def _summed(node: Node) -> set[int]:
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return _all(node)
    terms, result = equation.replace(" ", "").split("->")
    letters = {
        term[d]
        for term, operand in zip(terms.split(","), node.inputs, strict=False)
        for d in operand.positions
    }
    return {d for d, letter in enumerate(result) if letter in letters}


def moved_order(node: Node, rank: int) -> list[int]:
    """Former places of the dimensions behind a `movedim`."""
    origin, target = node.args[1:3] if len(node.args) > 2 else tuple(node.kwargs.values())[-2:]
    start = [d % rank for d in _integers([origin])]
    end = [d % rank for d in _integers([target])]
    rest = iter(d for d in range(rank) if d not in start)
    return [start[end.index(d)] if d in end else next(rest) for d in range(rank)]


def _squeezed(node: Node, source: Node) -> set[int]:
    rank = len(source.shape)
    dims = {d % rank for d in _integers((node.args[1:], *node.kwargs.values()))}
    gone = {d for d in (dims or range(rank)) if source.shape[d] == 1}
    left = _dropped(set(source.positions), gone)
    return left if left is not None else _all(node)  # a 1×1 map stays a map


def _indexed(node: Node, source: Node) -> set[int] | None:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    taken = sum(1 for item in index if item is not None and item is not Ellipsis)
    items: list[Any] = []
    for item in index:
        items += [slice(None)] * (len(source.shape) - taken) if item is Ellipsis else [item]
    left, picked, old, new = set(), set(), 0, 0
    for item in [*items, *[slice(None)] * (len(source.shape) - taken)]:
        if old >= len(source.shape) and item is not None:
            break
        if item is None:
            new += 1
            continue
        if isinstance(item, int) and not isinstance(item, bool):
            picked.add(old)
        elif isinstance(item, slice):
            if old in source.positions:
                left.add(new)
            new += 1
        else:
            return _all(node)  # a tensor or a list of indices
        old += 1
    return left or None


def _regrouped(old: Sequence[int], mapped: set[int], new: Sequence[int]) -> set[int]:
    """Positions of a view: dimensions that are split or joined stand for what they were."""
    if 0 in old or math.prod(old) != math.prod(new):
        return set(range(1, len(new)))
    found: set[int] = set()
    i = j = 0
    while i < len(old) and j < len(new):
        i_end, j_end = i + 1, j + 1
        while (a := math.prod(old[i:i_end])) != (b := math.prod(new[j:j_end])):
            if a < b:
                i_end += 1
            else:
                j_end += 1
        if mapped & set(range(i, i_end)):
            found |= set(range(j, j_end))
        i, j = i_end, j_end
    rest = mapped & set(range(i, len(old)))  # a 1×1 map that was flattened
    if rest and not found:
        found.add(len(new) - 1)
    return found
