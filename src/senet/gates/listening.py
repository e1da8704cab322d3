"""Hear what the gates of SE blocks are while a network runs, or put others in their place.

A gate is what a map is multiplied by, not what some submodule returns: so the products themselves
are watched, at the sites that `senet.anatomy` found. A functional sigmoid in the middle of a
`forward` is seen like any other.

Shape suffixes: N images, C channels, * spatial dimensions.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from senet.anatomy import Excitation
from senet.anatomy.graph import Site, is_product
from senet.anatomy.occurrences import Occurrence
from senet.errors import SenetError
from senet.nn.hooks import without_remark
from senet.support.shapes import Float

# Rounding of one product and of gates that are computed in another order, in units of the dtype.
_ROUNDING = 16

Seen = Callable[[str, Tensor, Tensor], Tensor | None]
"""Called with a block's name, the map (N,C,*) as it is there, and the gates (N,C).

What it returns takes the place of the gates: (C,) for all images; None leaves them.
"""


class Listening(TorchFunctionMode):
    """While this context is open, `seen` hears of each product of an SE block with its map.

    Args:
        model: the network.
        blocks: its SE blocks.
        seen: what hears of them.

    Raises:
        SenetError: inside, where a block's product is not what it was when it was found.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Excitation], seen: Seen) -> None:
        super().__init__()
        self.model, self.blocks, self.seen = model, blocks, seen
        self.places: dict[Site, tuple[str, Occurrence]] = {
            occurrence.site: (name, occurrence)
            for name, block in blocks.items()
            for occurrence in block.occurrences
        }
        self.stack: list[list[Any]] = []  # name, call and products so far of each module call
        self.counts: dict[str, int] = {}
        self.checked: set[str] = set()
        self.open = ExitStack()

    def __enter__(self) -> "Listening":
        modules = dict(self.model.named_modules())
        watched = {"", *(site.module for site in self.places)}
        # Hooks on the blocks themselves also keep them out of the fused operator.
        watched |= {name for name, block in self.blocks.items() if block.module is not None}
        for name in watched:
            handles = (
                modules[name].register_forward_pre_hook(
                    lambda _module, _inputs, name=name: self._enter(name)
                ),
                modules[name].register_forward_hook(
                    lambda _module, _inputs, _output: self._leave(), always_call=True
                ),
            )
            for handle in handles:
                self.open.callback(handle.remove)
        self.open.enter_context(without_remark())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.open.close()

    def _enter(self, name: str) -> None:
        if not name:
            self.stack.clear()
            self.counts.clear()
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        self.stack.append([name, number, 0])

    def _leave(self) -> None:
        if self.stack:
            self.stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not self.stack or not is_product(func, tensors):
            return func(*args, **kwargs)
        site = Site(*self.stack[-1])
        for call in self.stack:
            call[2] += 1
        if site not in self.places:
            return func(*args, **kwargs)
        name, occurrence = self.places[site]
        at = [node is occurrence.factor for node in occurrence.product.inputs].index(True)
        factor, scaled = tensors[at], tensors[1 - at]
        gates = self._gates(name, occurrence, scaled, factor)
        map_ = scaled.detach()
        instead = self.seen(name, _channels_second(map_, occurrence), gates)
        if instead is not None:
            other = _as_factor(instead, scaled, occurrence)
            return func(*(other if value is factor else value for value in args), **kwargs)
        if name in self.checked or not occurrence.squeezes:
            return func(*args, **kwargs)
        self.checked.add(name)
        before = map_.clone()
        result = func(*args, **kwargs)
        _check(name, before, _as_factor(gates, scaled, occurrence), result)
        return result

    def _gates(
        self, name: str, occurrence: Occurrence, scaled: Tensor, factor: Tensor
    ) -> Float[Tensor, "n c"]:
        if scaled.ndim != len(occurrence.map.shape):
            raise SenetError(
                f"{name} does not show its gates: the network computed something else than on its "
                "first image; record images of one kind"
            )
        wide = factor.detach().expand(scaled.shape)
        for d in sorted(occurrence.map.positions, reverse=True):
            # Without a squeeze each position has gates of its own: their mean counts.
            wide = wide.select(d, 0) if occurrence.squeezes else wide.mean(d)
        return wide.flatten(1)


def _channels_second(map_: Tensor, occurrence: Occurrence) -> Tensor:
    """A map as (N,C,*)."""
    positions = occurrence.map.positions
    numbers = [d for d in range(1, map_.ndim) if d not in positions]
    return map_.permute(0, *numbers, *positions).flatten(1, len(numbers))


def _as_factor(gates: Tensor, scaled: Tensor, occurrence: Occurrence) -> Tensor:
    """Gates (N,C) or (C,) so that they broadcast to the map."""
    shape = [1 if d in occurrence.map.positions else size for d, size in enumerate(scaled.shape)]
    shape[0] = -1 if gates.ndim > 1 else 1
    return gates.to(scaled.dtype).reshape(shape)


def _check(name: str, map_: Tensor, factor: Tensor, result: Tensor) -> None:
    """Whether the output is the map times the gates.

    Raises:
        SenetError: it is not.
    """
    error = (result - map_ * factor).abs().max() if result.numel() else result.sum()
    bound = _ROUNDING * torch.finfo(result.dtype).eps * result.abs().max() if error != 0 else 0
    if error > bound:
        raise SenetError(
            f"{name} does not show its gates: its output differs from map times gates by "
            f"{float(error):.2g}"
        )
