"""The C++ library: how it is compiled, installed, found, checked and loaded."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from enum import IntEnum
from pathlib import Path

import pytest

from senet import kernels
from senet.errors import UserError
from senet.kernels import structs

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "src/senet/kernels"
# `make` installs CMake beside Python where the system has none.
TOOLS = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
needs_library = pytest.mark.skipif(kernels.LIBRARY is None, reason=kernels.MISSING)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "PATH": TOOLS, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    """All that CMake would compile, with the flags of each instruction set."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on this machine")
    options = ("-G", "Unix Makefiles", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    made = run("cmake", "-S", "cmake", "-B", tmp_path, *options, CXX=compiler, CXXFLAGS="")
    assert made.returncode == 0, made.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    assert len(commands) in (4, 10)  # dispatch.cpp, and three files for each instruction set
    for command in commands:
        checked = run(*command["command"].split(), "-fsyntax-only", "-Werror")
        assert checked.returncode == 0, checked.stderr
        assert "-Wall -Wextra" in command["command"]


def test_each_header_stands_alone() -> None:
    compiler = next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    headers = [f"-include{path}" for path in sorted(SOURCES.rglob("*.h"))]
    assert len(headers) > 15
    for header in headers:
        empty = ("-x", "c++", os.devnull)
        checked = run(compiler, "-std=c++17", "-fsyntax-only", header, *empty)
        assert checked.returncode == 0, checked.stderr


def test_code_that_instruction_sets_would_share_fails_the_build(tmp_path: Path) -> None:
    """Merged by name, an inline function of -mavx512f would end a process on another processor."""
    compiler, nm = os.environ.get("CXX") or shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("no C++ compiler on this machine")
    for kept, code in (
        ("static", "static int f() { return 1; }"),
        ("merged", "inline int f() { return 1; }"),
    ):
        source, target = tmp_path / f"{kept}.cpp", tmp_path / f"{kept}.o"
        source.write_text(f"{code} int (*address)() = f;")
        assert run(compiler, "-c", source, "-o", target).returncode == 0
        checked = run(
            "cmake", f"-DNM={nm}", f"-DOBJECTS={target}", "-P", ROOT / "cmake/unmerged.cmake"
        )
        assert (checked.returncode == 0) == (kept == "static"), checked.stderr


def wheel(folder: Path, **environment: str) -> set[str]:
    """Builds a wheel into `folder`, unpacks it there and gives the names of its files."""
    pytest.importorskip("scikit_build_core")
    code = "import sys, backend; backend.build_wheel(sys.argv[1])"
    built = run(sys.executable, "-c", code, folder, PYTHONPATH=str(ROOT / "cmake"), **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        return set(archive.namelist())


def test_installation_without_a_compiler_succeeds(tmp_path: Path) -> None:
    names = wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    for name in ("py.typed", "models/cards.toml", "kernels/structs.py"):
        assert f"senet/{name}" in names
    assert any(name.startswith("senet/data/sources/fashion_mnist/") for name in names)
    assert not [name for name in names if name.endswith((".so", ".h", ".cpp"))]
    library, reason = kernels.load(tmp_path / "senet/kernels")
    assert library is None
    assert "install a C++17 compiler" in reason


def test_installation_without_cmake_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scikit-build-core finds none, as in an environment that is not isolated."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(ROOT / "cmake")
    monkeypatch.chdir(ROOT)
    from scikit_build_core.build import wheel as implementation
    from scikit_build_core.errors import CMakeNotFoundError

    def missing(**_: object) -> None:
        raise CMakeNotFoundError("no CMake")

    monkeypatch.setattr(implementation.CMake, "default_search", missing)
    import backend

    name = backend.build_wheel(str(tmp_path))
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert "senet/kernels/structs.py" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_source_distribution_has_all_sources(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    code = "import sys, backend; backend.build_sdist(sys.argv[1])"
    built = run(sys.executable, "-c", code, tmp_path, PYTHONPATH=str(ROOT / "cmake"))
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(path, tmp_path)
    (unpacked,) = tmp_path.glob("senet-*/")
    wanted = [
        *SOURCES.rglob("*.h"),
        *SOURCES.rglob("*.cpp"),
        *(ROOT / "cmake").glob("unmerged.cmake"),
    ]
    for source in (*wanted, ROOT / "cmake/CMakeLists.txt", ROOT / "pyproject.toml"):
        assert (unpacked / source.relative_to(ROOT)).read_bytes() == source.read_bytes()
    assert not list(unpacked.rglob("*.so"))


@needs_library
def test_descriptions_agree_in_every_field() -> None:
    assert kernels.LIBRARY is not None
    assert structs.differing_field(kernels.LIBRARY) == ""


def swapped(fields: list[tuple[str, type]], first: str, second: str) -> list[tuple[str, type]]:
    other = {first: second, second: first}
    return [(other.get(name, name), kind) for name, kind in fields]


class TailArguments(ctypes.Structure):
    """P and H the other way round."""

    _fields_ = swapped(structs.TailArguments._fields_, "P", "H")


class Kind(IntEnum):
    INPUT = 0
    WINOGRAD = 1


@needs_library
@pytest.mark.parametrize(
    ("table", "ours", "message"),
    [
        ("STRUCTURES", TailArguments, r"has TailArguments\.P .* where Python has TailArguments\.H"),
        ("ENUMERATIONS", Kind, r"has Kind\.CONVOLUTION = 1 where Python has Kind\.WINOGRAD = 1"),
    ],
)
def test_first_differing_field_is_named(
    table: str, ours: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [ours if kind.__name__ == ours.__name__ else kind for kind in getattr(structs, table)]
    monkeypatch.setattr(structs, table, changed)
    library, reason = kernels.load(SOURCES)
    assert library is None
    assert re.search(message, reason)


@needs_library
@pytest.mark.parametrize("table", ["STRUCTURES", "ENUMERATIONS"])
def test_missing_description_is_noticed(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structs, table, getattr(structs, table)[:-1])
    library, reason = kernels.load(SOURCES)
    assert library is None
    assert "another version" in reason


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENET_ISA", "sse9")
    with pytest.raises(UserError, match=r"sse9.*avx512, avx2, baseline"):
        kernels.load(SOURCES)


def test_damaged_library_is_reported(tmp_path: Path) -> None:
    (tmp_path / "libsenet.so").write_bytes(b"not a library")
    library, reason = kernels.load(tmp_path)
    assert library is None
    assert "does not load" in reason


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps (Linux)")
def test_one_openmp_runtime_in_the_process() -> None:
    code = r"""
import pathlib, re, torch, senet
model = senet.create_model("se_resnet20_cifar").eval()
x = torch.randn(2, 3, 32, 32)
senet.optimize(model, x)(x)
model(x).sum().backward()
torch.ones(1000, 1000).mm(torch.ones(1000, 1000))
maps = pathlib.Path("/proc/self/maps").read_text()
assert "libsenet.so" in maps
print(*sorted(set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)\S*", maps))))
"""
    ran = run(sys.executable, "-W", "error", "-c", code)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) == 1
