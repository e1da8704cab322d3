"""Batch norm over two processes, for which two threads stand here; more: training/test_ranks.py."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from senet.nn import sync_bn
from senet.nn.sync_bn import SyncBatchNorm
from senet.nn.tails import bn_relu


class Exchange:
    """What batch norm takes of torch.distributed, between two threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.own = threading.local()
        self.given: dict[int, Tensor] = {}

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return 2

    def both(self, mine: Tensor) -> list[Tensor]:
        self.given[self.own.rank] = mine.clone()
        self.barrier.wait()
        found = [self.given[0], self.given[1]]
        self.barrier.wait()
        return found

    def all_gather(self, every: list[Tensor], mine: Tensor) -> None:
        for place, value in zip(every, self.both(mine), strict=True):
            place.copy_(value)

    def all_reduce(self, mine: Tensor) -> None:
        mine.copy_(sum(self.both(mine)))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    exchange = Exchange()
    monkeypatch.setattr(sync_bn, "dist", exchange)

    def run(action: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            exchange.own.rank = rank
            return action(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    return run


FULL = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def step(norm: nn.Module, x: Tensor, fused: bool) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = bn_relu(x, norm) if fused else norm(x).relu()
    (y**3).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **{k: v.clone() for k, v in norm.named_buffers()}}


@pytest.mark.parametrize("fused", [False, True])
def test_a_process_without_images(ranks: Callable[..., list[Any]], fused: bool) -> None:
    expected = step(nn.BatchNorm2d(3), FULL, fused=False)
    one, none = ranks(lambda rank: step(SyncBatchNorm(3), FULL if rank == 0 else FULL[:0], fused))
    torch.testing.assert_close(one, expected)
    assert none["y"].shape == none["dx"].shape == (0, 3, 2, 2)
    assert all(torch.equal(none[name], one[name]) for name in ("running_mean", "running_var"))


def test_no_images_at_all_teach_nothing(ranks: Callable[..., list[Any]]) -> None:
    expected = step(nn.BatchNorm2d(3), FULL[:0], fused=False)
    for found in ranks(lambda _: step(SyncBatchNorm(3), FULL[:0], fused=False)):
        for name in ("running_mean", "running_var", "y", "dx"):
            torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(ranks: Callable[..., list[Any]], dtype: torch.dtype, fused: bool) -> None:
    expected = step(nn.BatchNorm2d(3).to(dtype), FULL.to(dtype), fused=False)
    half = (FULL[:1].to(dtype), FULL[1:].to(dtype))
    found = ranks(lambda rank: step(SyncBatchNorm(3).to(dtype), half[rank], fused))
    torch.testing.assert_close(torch.cat([part["y"] for part in found]), expected["y"])
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(torch.cat([p["dx"] for p in found]), expected["dx"], **tolerance)


def test_no_second_derivative_is_better_than_a_wrong_one(ranks: Callable[..., list[Any]]) -> None:
    def twice(rank: int) -> None:
        x = FULL[2 * rank :][:2].clone().requires_grad_()
        (gradient,) = torch.autograd.grad((SyncBatchNorm(3)(x) ** 3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (gradient**2).sum().backward()

    ranks(twice)
