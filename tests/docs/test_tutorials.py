"""The code of the tutorials runs, in the order of each page."""

from pathlib import Path

import pytest
from pages import DOCS, run_page

# The blocks of each: a page whose marks were lost would else pass with nothing run.
TUTORIALS = {"train": 6, "network": 7, "gates": 4, "deploy": 5, "operator": 5}


def test_no_tutorial_is_left_out() -> None:
    assert {page.stem for page in (DOCS / "tutorials").glob("*.md")} == {"index", *TUTORIALS}


@pytest.mark.parametrize("name", TUTORIALS)
def test_the_code_of_the_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(DOCS / "tutorials" / f"{name}.md") == TUTORIALS[name]
