"""The site: its navigation holds every page, its reference every public name, its links lead on."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml
from pages import DOCS

import senet

ROOT = DOCS.parent
PAGES = sorted(DOCS.rglob("*.md"))
PACKAGES = [
    "senet", "senet.anatomy", "senet.data", "senet.errors", "senet.fusion", "senet.inference",
    "senet.models", "senet.ops", "senet.training", "senet.weights",
]  # fmt: skip
# Modules that register networks when imported, and subpackages with pages of their own.
NOT_NAMES = re.compile(
    r"senet\.(__version__|anatomy|detection|ops|segmentation|training)$|"
    r"senet\.models\.(inception_\w+|mobilenet|resnet|shake_shake|shufflenet|vgg)$"
)


def _leaves(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    assert not isinstance(parts, str)
    return [leaf for part in parts for leaf in _leaves(part)]  # type: ignore[union-attr]


def test_the_navigation_holds_every_page() -> None:
    configured = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    leaves = _leaves(configured["nav"])
    assert sorted(leaves) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def _exported(package: str) -> set[str]:
    """Names that a package says are its own: `__all__`, or `import … as` the same name."""
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        return set(module.__all__)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    imported = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    names = {a.asname for node in imported for a in node.names if a.asname == a.name}
    return names or {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _referenced() -> dict[str, object]:
    found = {}
    for page in (DOCS / "reference").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = path.rpartition(".")
            found[path] = getattr(importlib.import_module(module), name)
    return found


def test_the_reference_has_every_public_name() -> None:
    referenced = _referenced()
    reached = [thing for thing in referenced.values() if callable(thing)]
    missing = [
        f"{package}.{name}"
        for package in PACKAGES
        for name in sorted(_exported(package))
        if f"{package}.{name}" not in referenced
        and not NOT_NAMES.match(f"{package}.{name}")
        # Also public elsewhere: senet.fuse is senet.fusion.fuse.
        and getattr(importlib.import_module(package), name) not in reached
    ]
    assert not missing
    assert set(senet.__all__) >= {path.split(".")[1] for path in referenced if path.count(".") == 1}


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, made as both GitHub and Python-Markdown make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        link = "".join(target)
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), link
        assert not anchor or anchor in _anchors(found), link


def test_the_papers_tables_are_those_of_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    assert importlib.import_module("paper_tables").text() == (DOCS / "paper.md").read_text("utf-8")
