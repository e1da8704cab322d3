"""The NEON kernels, cross-compiled and run in an emulator, under the tests of all other kernels."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
# `make` installs CMake beside Python where the system has none.
TOOLS = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
NEEDS = [COMPILER, EMULATOR, "cmake"]


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command of `remote_kernels` with the library for aarch64."""
    if missing := [name for name in NEEDS if shutil.which(name, path=TOOLS) is None]:
        pytest.skip(
            f"no {', '.join(missing)} here (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
        )
    folder = tmp_path_factory.mktemp("aarch64")
    driver = folder / "remote_kernels"
    cmake = str(shutil.which("cmake", path=TOOLS))
    subprocess.run(
        [cmake, "-S", ROOT / "cmake", "-B", folder, "-DCMAKE_SYSTEM_NAME=Linux",
         "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
         "-DCMAKE_CXX_FLAGS=-Werror"],
        check=True,
    )  # fmt: skip
    subprocess.run([cmake, "--build", folder, "--parallel"], check=True)
    subprocess.run(
        [COMPILER, "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-o", driver,
         ROOT / "tests" / "helpers" / "remote_kernels.cpp", "-ldl", "-Wl,--no-as-needed", "-lgomp"],
        check=True,
    )  # fmt: skip
    return f"{EMULATOR} -L {SYSROOT} {driver} {folder / 'libsenet.so'}"


@pytest.mark.soak
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/ops/test_ops_parity.py", "-k", "all_parts_of_the_tail and cpu"],
        ["tests/ops/test_ops_join.py", "-k", "cpu"],
        ["tests/ops/test_ops_depthwise.py"],
        ["tests/ops/test_convolution.py", "-k", "not instruction_set and not sanitizer"],
        # What starts a process with another of this processor's sets has no emulator there.
        ["tests/inference/test_kernels.py", "-k", "not instruction_sets"],
        ["tests/inference/test_activations.py", "-k", "not other_sets"],
    ],
    ids=lambda tests: Path(tests[0]).stem,
)
def test_neon_kernels_pass_the_tests_of_all_kernels(remote: str, tests: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "remote_kernels", *tests],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "SENET_REMOTE": remote, "PYTHONPATH": "tests/helpers"},
    )
    assert done.returncode == 0, done.stdout
    calls = re.search(r"^(\d+) calls of neon kernels$", done.stdout, re.MULTILINE)
    assert calls is not None
    assert int(calls[1]) > 10
