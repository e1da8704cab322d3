"""The operator's C++ kernels: instruction sets, threads, sanitizers, a machine without them."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import Case, inputs, run
from torch import Tensor

from senet import kernels, ops
from senet.errors import UserError
from senet.ops import choice

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "src/senet/kernels/operator"


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT / 'src'}", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


PARITY = """
import torch
from ops_cases import Case, oracle, parts, run
from join_cases import joins, oracle as join_oracle, run as join_run
from tolerances import assert_close
from senet import kernels
print(kernels.instruction_set())
for layout in ("channels_last", "contiguous"):
    for dtype in (torch.float32, torch.bfloat16):
        for case in parts(layout=layout, dtype=dtype, C=37, hidden=17):
            assert_close(run("cpu", case), oracle(case), dtype, case)
        for case in joins(layout=layout, dtype=dtype):
            assert_close(join_run("cpu", case), join_oracle(case), dtype, case)
"""


@pytest.mark.parametrize("isa", kernels.ISAS)
def test_every_instruction_set(isa: str) -> None:
    """A set that the processor lacks falls back to the next one down."""
    best = kernels.ISAS.index(os.environ.get("SENET_ISA") or kernels.instruction_set())
    chosen = run_python(PARITY, SENET_ISA=isa).split()[0]
    assert chosen == kernels.ISAS[max(best, kernels.ISAS.index(isa))]


def maps(case: Case) -> list[Tensor]:
    return list(run("cpu", case).values())


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_same_bits_every_time(layout: str) -> None:
    for training in (True, False):
        case = Case(N=5, C=72, spatial=(30, 31), hidden=9, layout=layout, training=training)
        first = maps(case)
        for _ in range(5):
            assert all(map(torch.equal, maps(case), first))


@pytest.mark.parametrize(
    "case",
    [
        Case(N=5, C=72, spatial=(30, 31), hidden=33, shortcut="normalized"),
        # With given statistics images are worked on in groups, whose size does depend on it: here
        # one image for one thread, all for five.
        Case(N=5, C=128, spatial=(64, 64), hidden=33, shortcut="none", training=False),
    ],
)
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(maps(case))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_large_maps_are_streamed_correctly() -> None:
    """Above 24 MB the kernels write past the cache; odd rows and unaligned maps cannot."""
    for C, offset in ((256, 0), (255, 0), (256, 3)):
        case = Case(N=1, C=C, spatial=(160, 160), hidden=2, gated=False)
        small = Case(N=1, C=C, spatial=(160, 40), hidden=2, gated=False, training=False)
        numbers = inputs(case)
        if offset:
            for name in ("x", "shortcut", "gradient"):
                flat = torch.empty(numbers[name].numel() + offset)[offset:]
                view = flat.view(1, 160, 160, C).permute(0, 3, 1, 2)
                numbers[name] = view.copy_(numbers[name])
        frozen = Case(N=1, C=C, spatial=(160, 160), hidden=2, gated=False, training=False)
        whole = run("cpu", frozen, numbers, ("x", "shortcut"))
        for start in range(0, 160, 40):  # with running statistics every pixel is on its own
            rows = slice(start, start + 40)
            part = {k: v[:, :, :, rows] if v.ndim == 4 else v for k, v in numbers.items()}
            cut = run("cpu", small, part, ("x", "shortcut"))
            for name in ("y", "x", "shortcut"):
                assert torch.equal(whole[name][:, :, :, rows], cut[name])


@pytest.mark.soak
def test_sanitizers(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan over every kernel, on buffers without a byte to spare."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    driver = tmp_path / "driver"
    avx2 = " -mavx2 -mfma -mbmi2" if platform.machine() in ("x86_64", "AMD64") else ""
    flags = f"-std=c++17 -O0 -fopenmp -ffp-contract=fast -Wall -Wextra -Werror{avx2}"
    sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    command = (
        f"{compiler} {flags} {sanitizers} -I{SOURCES} {HERE / 'kernel_driver.cpp'} -o {driver}"
    )
    built = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([driver], capture_output=True, text=True, timeout=300, check=False)
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(r"800 checks, 0 failures\n", result.stdout)


def test_without_kernels_the_algebra_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", None)
    monkeypatch.setattr(kernels, "MISSING", "not built; install g++")
    monkeypatch.setattr(choice, "_warned", False)
    assert not ops.implementations()["cpu"].available
    assert "g++" in ops.implementations()["cpu"].reason
    with pytest.warns(UserWarning, match="without its C\\+\\+ kernels.*g\\+\\+"):
        run("auto", Case())
    run("auto", Case())
    assert not recwarn.list
    with pytest.raises(UserError, match="not available"):
        ops.use("cpu")
