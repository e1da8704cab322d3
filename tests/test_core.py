"""The package without its extras: it works, says what is missing, and loads little."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from core_environment import make_environment
from packaging.requirements import Requirement

from senet.support.extras import SOURCES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with this package and its core requirements only."""
    executable, site = make_environment(
        tmp_path_factory.mktemp("core") / "environment", PROJECT["dependencies"]
    )
    (site / "senet").symlink_to(ROOT / "src" / "senet")
    return executable


def test_core_requirements() -> None:
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert names == {"torch", "numpy", "safetensors", "huggingface_hub"}


def test_core_alone_does_all_that_it_should(python: Path, tmp_path: Path) -> None:
    program = Path(__file__).parent / "helpers" / "core_program.py"
    done = subprocess.run(
        [python, program, tmp_path], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].startswith(str(python.parents[1]))


def test_command_without_its_extra_says_what_to_install(python: Path) -> None:
    for start in (["-m", "senet", "train"], ["-c", "from senet.__main__ import main"]):
        done = subprocess.run([python, *start], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            r"senet: the command needs more than the core: \w+ is not installed: "
            r"pip install 'senet\[train\]'\n",
            done.stderr,
        )


def test_each_requirement_of_an_extra_has_its_remedy() -> None:
    modules = {
        name.lower().replace("_", "-"): module
        for module, distributions in importlib.metadata.packages_distributions().items()
        for name in distributions
        if module in SOURCES
    }
    for extra in ("train", "export", "datasets"):
        for text in PROJECT["optional-dependencies"][extra]:
            name = Requirement(text).name.lower().replace("_", "-")
            if name != "senet":
                assert SOURCES[modules[name]] == f"'senet[{extra}]'"


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_import_loads_little() -> None:
    """Modules, not seconds: 0.02 s and 0.2 s beyond Python's and PyTorch's own (docs/packaging.md).

    Measured: 12 and 117 modules, of which 71 are Triton's, for PyTorch's counter of flops.
    """
    python = loaded("import json")
    package = loaded("import senet") - python
    assert len(package) < 40
    assert not {name for name in package if name.startswith(("torch", "numpy"))}
    block = loaded("from senet import SqueezeExcitation") - loaded("import torch, json")
    assert len(block) < 180
    foreign = {name.partition(".")[0] for name in block} - sys.stdlib_module_names
    assert foreign <= {"senet", "torch", "triton"}
