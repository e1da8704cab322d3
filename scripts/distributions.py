"""Builds the source distribution and the wheel into dist/ and checks both: `make dist`.

1. The sdist of this checkout, and of that the wheel (the way an installer builds it).
2. auditwheel gives the wheel the platform tag that the symbols of its library allow.
3. twine's check; what lies in both; how large they are.
4. Each is installed into an environment that holds the core's requirements and nothing else, with a
   PATH on which no compiler is. There tests/helpers/core_program.py runs: with the wheel for each
   instruction set that this processor has, with the sdist without kernels.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from core_environment import make_environment  # noqa: E402  (after the path)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAM = ROOT / "tests" / "helpers" / "core_program.py"
NEWEST_GLIBC = (2, 28)
MOST_BYTES = {"wheel": 9 << 20, "sdist": 7 << 20}
LIBRARY = "senet/kernels/libsenet.so"


class Unfit(SystemExit):
    """Something that may not be released; ends the script with one line."""


def run(*command: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What a command prints; it ends the script if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=env, cwd=cwd,
    )  # fmt: skip
    if done.returncode:
        raise Unfit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def build(out: Path) -> tuple[Path, Path]:
    """Source distribution and wheel, with auditwheel's tag."""
    for old in out.glob("senet-*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as plain:
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", plain, ROOT)
        (wheel,) = Path(plain).glob("*.whl")
        (sdist,) = Path(plain).glob("*.tar.gz")
        print(*run("auditwheel", "show", wheel).split(), sep=" ")
        run("auditwheel", "repair", "--wheel-dir", out, wheel)
        sdist = sdist.rename(out / sdist.name)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def check_tag(wheel: Path) -> None:
    """One wheel for all Pythons, and for every Linux that is not older than that glibc."""
    tags = [tuple(map(int, found)) for found in re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)]
    if not wheel.name.split("-")[2:4] == ["py3", "none"] or not tags or min(tags) > NEWEST_GLIBC:
        raise Unfit(f"{wheel.name}: want py3-none-manylinux of glibc 2.28 or older")


def differences(kind: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a distribution that holds other files than it should."""
    found, expected = set(found), set(expected)
    if found != expected:
        lines = [f"  more: {name}" for name in sorted(found - expected)]
        lines += [f"  missing: {name}" for name in sorted(expected - found)]
        raise Unfit("\n".join([f"the {kind} does not hold what it should:", *lines]))


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every tracked file is in the sdist, every tracked module in the wheel, and nothing else."""
    tracked = run("git", "ls-files").split("\n")[:-1]
    with tarfile.open(sdist) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    differences("sdist", names, [*tracked, "PKG-INFO"])
    with zipfile.ZipFile(wheel) as archive:
        files = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    held = [name for name in files if ".dist-info/" not in name]
    modules = [
        name.removeprefix("src/")
        for name in tracked
        if name.startswith("src/senet/") and not name.endswith((".h", ".cpp"))
    ]
    differences("wheel", held, [*modules, LIBRARY])
    for kind, path in (("sdist", sdist), ("wheel", wheel)):
        size = path.stat().st_size
        print(f"{path.name}: {size / 2**20:.2f} MiB")
        if size > MOST_BYTES[kind]:
            raise Unfit(f"{path.name} has {size} bytes; more than {MOST_BYTES[kind]} need a reason")


def instruction_sets() -> list[str]:
    """Those of the kernels that this processor has, best first."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    wanted = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "avx2": {"avx2", "fma"}}
    return [name for name, needs in wanted.items() if needs <= flags] + ["baseline"]


def try_installed(distribution: Path, *, kernels: bool) -> None:
    """Install it where there is no compiler, and run the core's program there."""
    core = PROJECT["project"]["dependencies"]
    backend = PROJECT["build-system"]["requires"] if distribution.suffix == ".gz" else []
    with tempfile.TemporaryDirectory() as folder:
        python, site = make_environment(Path(folder) / "environment", [*core, *backend])
        env = {"PATH": str(python.parent), "HOME": folder, "OMP_NUM_THREADS": "2"}
        run(
            sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps",
            "--no-build-isolation", "--no-cache-dir", distribution, env=env, cwd=Path(folder),
        )  # fmt: skip
        if not (site / "senet" / "__init__.py").exists():
            raise Unfit(f"{distribution.name} was not installed into {site}")
        command = subprocess.run(
            [python.parent / "senet", "train"], capture_output=True, text=True, env=env, check=False
        )
        if command.returncode != 2 or "pip install 'senet[train]'" not in command.stderr:
            raise Unfit(f"the command without its extra says: {command.stderr}")
        for isa in instruction_sets() if kernels else [""]:
            said = run(python, PROGRAM, folder, env={**env, "SENET_ISA": isa}, cwd=Path(folder))
            where, reason = said.strip().split("\n")[-2:]  # behind warnings
            if Path(where) != site / "senet":
                raise Unfit(f"{where} was tried instead of {site}")
            good = f"C++ kernels for {isa}" if kernels else "the C++ kernels were not built"
            if not reason.startswith(good):
                raise Unfit(f"{distribution.name}: {reason}; expected: {good}")
            print(f"{distribution.name}: works, {reason}")


def main() -> None:
    """Build and check; the first thing that may not be released ends it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--built", action="store_true", help="check what lies in OUT already")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if arguments.built:
        (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    else:
        sdist, wheel = build(out)
    check_tag(wheel)
    print(run("twine", "check", "--strict", sdist, wheel).strip())
    check_contents(sdist, wheel)
    try_installed(wheel, kernels=True)
    try_installed(sdist, kernels=False)
    print(f"fit for release: {wheel.name}, {sdist.name}")


if __name__ == "__main__":
    main()
