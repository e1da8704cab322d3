"""Which small faults do the tests let through? Changes one thing at a time, and reports survivors.

A mutant is the source with one operator, comparison, constant, condition, argument or statement
changed. It is written into a copy of the tree, and the tests of its module run there; a mutant that
all of them let pass is a hole in the tests, or makes no difference. `docs/reliability.md` has the
figures.

    python scripts/mutants.py --limit 20 --seed 1 --module gates data/samplers

Linux and macOS. Ctrl-C leaves nothing behind.
"""

import argparse
import ast
import compileall
import copy
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
# What is mutated (files or folders of src/senet), and the quick ones of its tests.
FOLDING = ("tests/gates", "-k", "not vgg and not concatenation and not depthwise")
TESTS = {
    "ops/algebra": ("tests/ops", "-k", "not triton and not compile and not inductor"),
    "gates/fold": FOLDING,
    "gates/targets": FOLDING,
    "data/samplers": ("tests/data/test_samplers.py",),
    "data/transforms": ("tests/data/test_transforms.py",),
    "training/session": ("tests/training/test_session.py", "tests/training/test_loop.py"),
    "weights": ("tests/weights", "tests/models/test_parity.py"),
}
# What takes long to import is imported once; each mutant's tests run in a fork of that process.
PRELOADED = ["torch", "torchvision", "accelerate", "timm", "torchmetrics", "datasets", "pytest"]
OPERATORS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq},
    **{ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
}
# Types, documentation and messages are not behaviour.
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "type_params")
SKIPPED_NODES = (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr, ast.Raise)


@dataclass(frozen=True)
class Mutant:
    """One change of a file: `name` of `parent`, a node of the tree, becomes `changed`."""

    file: Path
    tree: ast.Module
    parent: ast.AST
    name: str
    changed: Any
    before: ast.AST
    after: ast.AST

    @property
    def line(self) -> int:
        """Where it is."""
        return getattr(self.before, "lineno", getattr(self.parent, "lineno", 0))

    def source(self) -> str:
        """The whole file with the change."""
        original = getattr(self.parent, self.name)
        setattr(self.parent, self.name, self.changed)
        try:
            return ast.unparse(self.tree)
        finally:
            setattr(self.parent, self.name, original)

    def __str__(self) -> str:
        texts = [ast.unparse(node).split("\n")[0] for node in (self.before, self.after)]
        before, after = (t if len(t) <= 90 else f"{t[:87]}..." for t in texts)
        return f"{self.file.relative_to(ROOT)}:{self.line}: {before}  →  {after}"


def changed(node: ast.AST, **fields: Any) -> ast.AST:
    """A copy of the node with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of this node."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield changed(node, op=OPERATORS[type(op)]())
        case ast.Compare(ops=[op, *rest]) if type(op) in OPERATORS:
            yield changed(node, ops=[OPERATORS[type(op)](), *rest])
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[_, *rest]):
            yield changed(node, ifs=rest)
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
    if isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            first, second = node.args[i : i + 2]
            if not any(isinstance(each, ast.Starred) for each in (first, second)):
                yield changed(node, args=[*node.args[:i], second, first, *node.args[i + 2 :]])
        for i in range(len(node.keywords)):
            yield changed(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant | ast.Yield):
        yield ast.Pass()
    if isinstance(node, ast.Raise | ast.AugAssign):
        yield ast.Pass()
    if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple):
        yield ast.Pass()  # an attribute or an element


def mutants(file: Path) -> list[Mutant]:
    """All mutants of a file."""
    tree = ast.parse(file.read_text())
    found: list[Mutant] = []

    def walk(node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in SKIPPED_FIELDS:
                continue
            several = isinstance(value, list)
            for i, child in enumerate(value if several else [value]):
                if not isinstance(child, ast.AST):
                    continue
                for new in variants(child):
                    whole = [*value[:i], new, *value[i + 1 :]] if several else new
                    found.append(Mutant(file, tree, node, name, whole, child, new))
                if not isinstance(child, SKIPPED_NODES):
                    walk(child)

    walk(tree)
    return found


def run_tests(tree: Path, arguments: tuple[str, ...], log: Path) -> None:
    """In a process of its own: the tests, on the package as it lies in `tree`."""
    os.setsid()
    os.chdir(tree)
    sys.dont_write_bytecode = True
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # An editable installation may put a finder of its own in front of the path.
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
    sys.path.insert(0, str(tree / "src"))
    os.environ["PYTHONPATH"] = str(tree / "src")
    import pytest

    import senet

    assert Path(senet.__file__).is_relative_to(tree), senet.__file__
    # Plugins that the preloaded packages have imported already cannot be rewritten.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
    sys.exit(pytest.main(["-x", "-q", *quiet, *arguments]))


def passes(tree: Path, arguments: tuple[str, ...], timeout: float) -> bool:
    """Whether the tests pass, in time."""
    process = CONTEXT.Process(target=run_tests, args=(tree, arguments, tree / "tests.log"))
    process.start()
    try:
        process.join(timeout)
        return process.exitcode == 0
    finally:
        if process.is_alive() and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()


def files_of(module: str) -> list[Path]:
    """The files of a module: one, or all in a folder of that name."""
    path = ROOT / "src" / "senet" / module
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    if not found or not found[0].exists():
        sys.exit(f"no such module: src/senet/{module}")
    return found


def main() -> None:
    """Draw mutants and try them, module by module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--module", nargs="+", default=list(TESTS), help=f"of {', '.join(TESTS)}")
    parser.add_argument("--limit", type=int, help="mutants a module, drawn at random; default all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    wanted = [m for m in TESTS if any(m.startswith(each) for each in options.module)]
    if not wanted:
        parser.error(f"--module takes {', '.join(TESTS)} or the beginning of one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder, "tree")
        hidden = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, tree, ignore=hidden)
        # Compiled once; no child writes, lest a mutant's bytecode be taken for that of another.
        compileall.compile_dir(tree / "src", quiet=1)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        passes(tree, ("--version",), 600)  # starts the server: not to be timed
        for module in wanted:
            began = time.perf_counter()
            if not passes(tree, TESTS[module], 600):
                sys.exit(
                    f"the tests of {module} fail unchanged:\n{(tree / 'tests.log').read_text()}"
                )
            timeout = 10 + 3 * (time.perf_counter() - began)
            drawn = [mutant for file in files_of(module) for mutant in mutants(file)]
            every = len(drawn)
            random.Random(options.seed).shuffle(drawn)
            drawn = sorted(drawn[: options.limit], key=lambda m: (m.file, m.line))
            left = 0
            for mutant in track(drawn, module, disable=not sys.stderr.isatty()):
                target = tree / mutant.file.relative_to(ROOT)
                target.write_text(mutant.source())
                if passes(tree, TESTS[module], timeout):
                    left += 1
                    print(f"survived  {mutant}", flush=True)
                shutil.copy2(mutant.file, target)  # with its time, that of the bytecode
            seconds = time.perf_counter() - began
            print(f"{module}: {len(drawn)} of {every} mutants, {left} survived, {seconds:.0f} s")


if __name__ == "__main__":
    CONTEXT = multiprocessing.get_context("forkserver")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
