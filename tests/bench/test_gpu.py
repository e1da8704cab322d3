"""The GPU's benchmarks, tried on the CPU at small sizes; and the refusal where there is no GPU."""

from functools import partial

import pytest
import torch
from cli_tools import run
from torch import nn

from senet.bench import gpu
from senet.bench.ops import COPY
from senet.bench.timing import summarize
from senet.errors import UserError
from senet.networks.create import create_model

TINY = gpu.Networks(
    {
        "senet se_resnet8_cifar": partial(create_model, "se_resnet8_cifar"),
        "peer": lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
        ),
    },
    frozenset(),
)


def test_tail_runs_in_both_precisions() -> None:
    cases = gpu.cases("ops", "cpu", compiled=False, shapes=((2, 16, 4, 4),))
    assert [case.benchmark for case in cases] == ["tail, bf16", "tail, TF32"]
    for case in cases:
        found = gpu.measure(case, "cpu", rounds=1, warmup=1)
        assert [m.contestant for m in found] == ["senet", "timm eager", COPY]
        assert all(m.quantiles[0] > 0 for m in found)


@pytest.mark.parametrize("what", ["train", "inference"])
def test_whole_networks_run(what: gpu.What) -> None:
    options = {"compiled": False, "networks": TINY, "image_size": 8}
    cases = gpu.cases(what, "cpu", (2,), **options)
    assert [case.name for case in cases] == ["batch 2"] * 2
    for case in cases:
        found = gpu.measure(case, "cpu", rounds=1, warmup=1)
        assert [m.contestant for m in found] == list(TINY.make)


def test_measuring_leaves_tf32_as_it_was() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    case = gpu.cases("ops", "cpu", compiled=False, shapes=((2, 16, 4, 4),))[0]
    gpu.measure(case, "cpu", rounds=1, warmup=1)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_conclusions() -> None:
    """1 GB in 16 bits a map: copied in 2 ms, 1000 GB/s; a tail of 11 passes takes 11 ms at best."""
    values = {"senet": (22.0,), "timm eager": (33.0,), COPY: (2.0,)}
    lines = gpu.conclusions(summarize("tail, bf16", "50×100×1000×100", "ms", values))
    assert lines[0].endswith("timm eager takes 1.50 times as much time as ours")
    assert "50% of the copy's bandwidth (1000 GB/s), counting 11 passes" in lines[1]


def test_refusals() -> None:
    with pytest.raises(UserError, match="fixed shapes"):
        gpu.cases("ops", "cpu", (8,))
    with pytest.raises(UserError, match="at least 2"):
        gpu.cases("train", "cpu", (1,), networks=TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("what", ["ops", "train", "inference"])
def test_no_gpu_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], what: str) -> None:
    outcome = run(capsys, "bench", what, "--device", "cuda", "--no-tune-allocator")
    outcome.refused("bench", "--device cuda: PyTorch finds no CUDA or ROCm GPU here")
