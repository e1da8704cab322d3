"""Device and precision of the benchmarks: a GPU's cases tried on the CPU, refusals without one."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from cli_tools import run
from torch import nn

from senet.bench import inference, ops, train
from senet.bench.networks import Entrant, entrants
from senet.bench.ops import COPY, conclusions_of_tails
from senet.bench.setting import SETTINGS, Setting
from senet.bench.timing import Case, measure, summarize
from senet.networks.create import create_model

AS_ON_A_GPU = tuple(Setting("cpu", setting.precision) for setting in SETTINGS["cuda"])
TINY = {
    "senet se_resnet8_cifar": Entrant(partial(create_model, "se_resnet8_cifar"), ours=True),
    "peer": Entrant(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
        )
    ),
}


def test_a_gpu_is_measured_in_two_precisions() -> None:
    assert SETTINGS["cuda"] == (Setting("cuda", "bf16"), Setting("cuda", "TF32"))
    shapes = [case.name for case in ops.cases(SETTINGS["cuda"])]
    assert shapes == ["64×256×56×56", "64×512×28×28", "64×1024×14×14", "64×2048×7×7"] * 2
    assert [case.name for case in train.cases(None, SETTINGS["cuda"])] == ["batch 256"] * 2
    whole = inference.network_cases(None, SETTINGS["cuda"])
    assert [case.name for case in whole] == ["batch 1", "batch 256"] * 2
    names = ["senet se_resnet50", "senet resnet50", "timm seresnet50", "timm resnet50"]
    compiled = [f"{name} compiled" for name in names]
    assert list(entrants("cuda", compiled=False)) == names
    assert list(entrants("cuda", compiled=True)) == names + compiled


def test_tail_runs_in_both_precisions() -> None:
    cases = ops.cases(AS_ON_A_GPU, shapes=((2, 16, 4, 4),), compiled=False)
    assert [case.benchmark for case in cases] == ["tail, bf16", "tail, TF32"]
    for case, dtype in zip(cases, (torch.bfloat16, torch.float32), strict=True):
        gradients = case.build()[0].run()
        assert isinstance(gradients, tuple)
        assert gradients[0].dtype == dtype
        found = measure(case, rounds=1, warmup=1)
        assert [m.contestant for m in found] == ["senet", "timm eager", COPY]
        assert all(m.quantiles[0] > 0 for m in found)


@pytest.mark.parametrize("make", [train.cases, inference.network_cases])
def test_whole_networks_run_in_both_precisions(make: Callable[..., Sequence[Case]]) -> None:
    cases = make((2,), AS_ON_A_GPU, networks=TINY, image_size=8)
    claims = [case.benchmark.partition(", ")[2] for case in cases]
    assert claims == ["bf16", "TF32"]
    for case in cases:
        assert case.name == "batch 2"
        found = measure(case, rounds=1, warmup=1)
        assert [m.contestant for m in found] == list(TINY)


def test_inference_in_bfloat16_gives_bfloat16() -> None:
    for case, dtype in zip(
        inference.network_cases((2,), AS_ON_A_GPU, networks=TINY, image_size=8),
        (torch.bfloat16, torch.float32),
        strict=True,
    ):
        for contestant in case.build():
            logits = contestant.run()
            assert isinstance(logits, torch.Tensor)
            assert logits.dtype == dtype, contestant.name


@pytest.mark.parametrize(("setting", "within"), [(AS_ON_A_GPU[0], True), (Setting(), False)])
def test_tf32_is_on_while_a_gpus_case_runs(setting: Setting, within: bool) -> None:
    def states() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = states()
    torch.backends.cudnn.allow_tf32 = False
    try:
        with setting.products():
            assert states() == (within, within)
        assert states() == (before[0], False)
    finally:
        torch.backends.cudnn.allow_tf32 = before[1]


def test_conclusions() -> None:
    """1 GB in 16 bits a map: copied in 2 ms, 1000 GB/s; a tail of 11 passes takes 11 ms at best."""
    values = {"senet": (22.0,), "timm eager": (33.0,), COPY: (2.0,)}
    lines = conclusions_of_tails(summarize("tail, bf16", "50×100×1000×100", "ms", values))
    assert lines[0].endswith("timm eager takes 1.50 times as much time as ours")
    assert "50% of the copy's bandwidth (1000 GB/s), counting 11 passes" in lines[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("what", ["ops", "train", "inference"])
def test_no_gpu_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], what: str) -> None:
    outcome = run(capsys, "bench", what, "--device", "cuda", "--no-tune-allocator")
    outcome.refused("bench", "--device cuda: PyTorch finds no CUDA or ROCm GPU here")
