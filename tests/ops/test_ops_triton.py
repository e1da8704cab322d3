"""The Triton kernels without a GPU: the oracle's tests in Triton's interpreter, and compiled.

TRITON_INTERPRET has to be set before Triton is imported, and would reach whatever else imports it,
so these tests run in processes of their own. A selection of shapes: the interpreter takes a
quarter of a second for a tail and its gradient. `make test-gpu` runs everything on a GPU.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from senet import ops
from senet.errors import UserError
from senet.ops.triton import common as triton

HERE = Path(__file__).parent
PARTS = "test_ops_parity.py::test_all_parts_of_the_tail"
NUMERICS = "test_ops_numerics.py::"
JOINS = "test_ops_bn_act_se.py::"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="TRITON IS NOT INSTALLED, its kernels are not tested: pip install triton (Linux)",
)

# The interpreter computes with NumPy, which warns of inf - inf and of overflow; a GPU does not.
NUMPY = ("-W", "ignore::RuntimeWarning")

SELECTIONS: dict[str, tuple[int, list[str]]] = {
    "float32": (1, [f"{PARTS}[torch.float32-channels_last-triton]"]),
    "16 bits": (
        2,
        [
            f"{PARTS}[torch.bfloat16-contiguous-triton]",
            f"{PARTS}[torch.float16-channels_last-triton]",
        ],
    ),
    "other activations": (
        3,
        [
            f"test_ops_parity.py::test_other_activations_behind_the_addition[{each}-triton]"
            for each in ("silu-channels_last", "hardswish-contiguous", "leaky_relu-channels_last")
        ],
    ),
    "gates and squeeze": (
        7,
        [
            "test_ops_parity.py::test_gates",
            "test_ops_parity.py::test_without_affine_parameters",
        ],
    ),
    "numerics": (
        40,
        [
            f"{NUMERICS}test_constant_channels_become_the_bias",
            f"{NUMERICS}test_denormals_are_kept",
            f"{NUMERICS}test_nonfinite_values_spread_as_in_pytorch",
            f"{NUMERICS}test_nan_passes_the_relu",
            f"{NUMERICS}test_nan_in_the_map_reaches_its_image_through_the_gate",
            f"{NUMERICS}test_statistics_without_buffers_are_the_batchs",
            f"{NUMERICS}test_types_of_maps_and_parameters_may_differ",
            f"{NUMERICS}test_empty_maps",
            "-k=triton",
        ],
    ),
    "means far above the deviation": (
        4,
        [
            f"{NUMERICS}test_mean_far_above_the_deviation",
            "-k=channels_last or step",
        ],
    ),
    "joins": (
        8,
        [
            f"{JOINS}test_every_activation[torch.float32-silu-triton]",
            f"{JOINS}test_every_activation[torch.bfloat16-gelu-triton]",
            f"{JOINS}test_every_activation[torch.float64-hardswish-triton]",
            f"{JOINS}test_every_activation[torch.float32-relu6-triton]",
            f"{JOINS}test_far_from_zero[leaky_relu-triton]",
            f"{JOINS}test_branches_of_other_kinds_beside_it",
            "test_ops_join.py::test_every_kind_of_branch[torch.float32-channels_last-triton]",
            "test_ops_join.py::test_every_kind_of_branch[torch.bfloat16-contiguous-triton]",
        ],
    ),
    "own": (24, ["triton_cases.py"]),
}


def run_pytest(*selection: str) -> int:
    """Run tests in the interpreter; how many passed."""
    environment = {"TRITON_INTERPRET": "1", "SENET_TEST_TRITON": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            *NUMPY,
            *selection,
        ],
        cwd=HERE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout
    return int(found[1])


SHORT = ("own", "float32")


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.soak) for name in SELECTIONS],
)
def test_in_the_interpreter(name: str) -> None:
    least, selection = SELECTIONS[name]
    assert run_pytest(*selection) >= least


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is built for Linux only")
@pytest.mark.parametrize(
    "arguments",
    [
        ("sm_90", "--first"),
        pytest.param(("sm_90",), marks=pytest.mark.soak),
        pytest.param(("gfx942",), marks=pytest.mark.soak),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """The interpreter takes what the compiler may refuse: types, layouts, sizes of a product."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_compile.py"), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert len(kernels) == 17, kernels


def test_choice_without_a_gpu() -> None:
    """By name it is refused with the reason; the environment's SENET_OPS likewise."""
    if not triton.missing():
        pytest.skip("Triton can run here")
    found = ops.implementations()["triton"]
    assert not found.available
    assert "no CUDA or ROCm GPU" in found.reason
    with pytest.raises(UserError, match=r"'triton', which is not available: .*GPU"):
        ops.use("triton")


def test_kernels_are_not_loaded_before_they_are_used() -> None:
    code = "import sys, senet.ops; assert 'senet.ops.triton.kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
