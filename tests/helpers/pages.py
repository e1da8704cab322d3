"""The code of a page of the documentation, run from top to bottom."""

import re
import shlex
from pathlib import Path

from senet.__main__ import main

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_page(page: Path) -> int:
    """Run the blocks marked `python`, and the commands of those marked `sh`; how many there are.

    All blocks share one namespace, and the current folder is theirs. What is only shown (output,
    commands for other data) is in blocks without a mark.
    """
    namespace: dict[str, object] = {"__name__": "tutorial"}
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    for number, (language, code) in enumerate(blocks):
        if language == "python":
            exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "senet", f"{page.name}: {line}"
            assert main(arguments) == 0, f"{page.name}: {line}"
    return len(blocks)
