"""What optimized networks return keeps its kind, and is the caller's own."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from senet.errors import SenetError
from senet.inference import optimization, optimize
from senet.inference.outputs import tensors
from senet.inference.rounding import difference


class Pair(NamedTuple):
    map: Tensor
    rest: list[Tensor]


@dataclasses.dataclass
class Record:
    map: Tensor
    name: str = "x"
    none: Tensor | None = None


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """As the outputs of Hugging Face's transformers: a dataclass and a dict of what is not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value


RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda y, z: {"map": y, "sum": z},
    "nested": lambda y, z: {"a": [y, (z, {"b": y})], "c": 3, "d": None},
    "list": lambda y, z: [y, z],
    "tuple": lambda y, z: (y, z, "text"),
    "named tuple": lambda y, z: Pair(y, [z, y]),
    "dataclass": lambda y, z: Record(y),
    "model output": lambda y, z: Output(logits=z, hidden_states=(y, y)),
    "ordered dict": lambda y, z: OrderedDict([("z", z), ("y", y)]),
    "chunks": lambda y, z: y.chunk(2, 1),
    "chunks in a dataclass": lambda y, z: Record(y.chunk(2, 1)[1]),
    "a view of three dimensions in a dataclass": lambda y, z: Record(y.flatten(2)),
    "dict of chunks": lambda y, z: {"chunks": y.chunk(2, 1), "whole": y.flatten(2)},
    "slice": lambda y, z: [y[:, 1:3], z[:2]],
}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 3), kind

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.conv(x))
        return RETURNED[self.kind](y, y.sum((2, 3)))


def kinds(value: Any) -> Any:
    """The classes of a nesting of containers."""
    if isinstance(value, dict):
        return type(value), [(key, kinds(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [kinds(inner) for inner in value]
    if dataclasses.is_dataclass(value):
        return type(value), [kinds(getattr(value, f.name)) for f in dataclasses.fields(value)]
    return type(value)


@torch.no_grad()
@pytest.mark.parametrize("kind", RETURNED)
def test_containers_keep_their_kind(kind: str) -> None:
    model = Net(kind).eval()
    fast = optimize(model, torch.randn(1, 3, 8, 8))
    assert not fast.report.left
    x, other = torch.randn(2, 2, 3, 9, 9)
    wanted, found = model(x), fast(x)
    for result in (found, fast.network.graph_module(x)):
        assert kinds(result) == kinds(wanted)
        assert difference(result, wanted) < 1e-5
    kept = [t.clone() for t in tensors(found)]
    fast(other)  # in the same memory
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(found), strict=True))


@torch.no_grad()
def test_containers_are_compared_with_the_original_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rewrite is refused whatever the network returns its tensors in."""

    def wrong(self: Any) -> nn.Module:
        self._model.conv.weight.mul_(1.5)
        return self._model

    monkeypatch.setattr(optimization._Optimizer, "run", wrong)
    for kind in RETURNED:
        with pytest.raises(SenetError, match="differs from the original's"):
            optimize(Net(kind).eval(), torch.randn(1, 3, 8, 8))
