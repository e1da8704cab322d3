"""What commands import before they know that there is something to do."""

import json
import subprocess
import sys

import pytest

from senet.cli import COMMANDS

HEAVY = {
    "torch", "torchvision", "numpy", "scipy", "matplotlib", "plotly", "accelerate", "torchmetrics",
    "torchdata", "tensorboard", "timm", "datasets", "onnx", "PIL", "safetensors", "huggingface_hub",
}  # fmt: skip
# Measured: 325 and 432 (Python 3.11), most of cyclopts and rich, with room for their next releases.
MOST = 600
SCRIPT = """
import contextlib, io, json, sys
from senet.__main__ import main
codes = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codes.append(main(arguments))
print(json.dumps([codes, sorted(sys.modules)]))
"""


def modules_after(*commands: list[str]) -> tuple[list[int], set[str]]:
    """Exit codes of commands in a fresh process, and the modules that it then holds."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
    )
    codes, modules = json.loads(done.stdout)
    return codes, set(modules)


def light(modules: set[str]) -> bool:
    return not {name.partition(".")[0] for name in modules} & HEAVY


def test_typos_of_every_command() -> None:
    codes, modules = modules_after(*([command.__name__, "--typo"] for command in COMMANDS))
    assert codes == [2] * len(COMMANDS)
    assert light(modules)
    assert len(modules) < MOST


@pytest.mark.parametrize(
    "commands",
    [
        [["--help"], *([command.__name__, "--help"] for command in COMMANDS)],
        [["models"], ["models", "se_*", "--json"], ["recipes"], ["recipes", "finetune"]],
    ],
)
def test_helps_and_tables(commands: list[list[str]]) -> None:
    codes, modules = modules_after(*commands)
    assert codes == [0] * len(commands)
    assert light(modules)
    assert len(modules) < MOST
