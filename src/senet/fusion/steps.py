"""The operations of a recorded run, to be compared with those of another one."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from senet.anatomy.graph import Node


def steps(nodes: Iterable[Node]) -> list[tuple[Any, ...]]:
    """Operations in a form that can be compared: their names, sizes and numbers."""
    kinds = (bool, int, float, str, type(None))
    return [
        (_name(node), node.shape, node.dtype, [a for a in node.arguments if type(a) in kinds])
        for node in nodes
        if node.kind != "input"
    ]


def _name(node: Node) -> str:
    """The same for x += y, which fx reads as x + y."""
    name = node.name.rstrip("_")
    return name.replace("__i", "__") if hasattr(operator, name[2:]) else name


def like(node: Node, module: nn.Module) -> Tensor:
    """Random numbers in the shape of a tensor that a module had, where the module is."""
    held = next(module.parameters(), next(module.buffers(), None))
    device = torch.device("cpu") if held is None else held.device
    if not node.dtype.is_floating_point:
        return torch.zeros(node.shape, dtype=node.dtype, device=device)
    made = torch.randn(node.shape, generator=torch.Generator().manual_seed(0))
    return made.to(device, node.dtype)


def is_sharded(module: nn.Module) -> bool:
    """Whether its parameters lie in parts elsewhere, so that it cannot be run by itself."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
