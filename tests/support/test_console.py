"""Names on a terminal are letters, never markup, emoji codes or control characters."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from senet.cli.tables import new_table, print_table
from senet.support.console import PlainColumn, PlainConsole
from senet.support.progress import EpochBars, EpochLines, watch
from senet.support.text import visible

NAME = "dog[puppy] [/] [b]x[/b] :dog: caf\udce9 \x1b[31m\x9b1m"
SHOWN = "dog[puppy] [/] [b]x[/b] :dog: caf\\xe9 \\x1b[31m\\x9b1m"
ROW = {"train_loss": 1.25, "val_loss": 1.5, "top1": 61.0, "top5": 99.5}


def test_visible() -> None:
    assert visible(NAME) == SHOWN
    assert visible("ein\nzwei\t猫 é $5") == "ein\nzwei\t猫 é $5"


def test_tables_show_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = new_table(NAME, right=("%",), title=NAME, caption=NAME)
    table.add_row(NAME, "1")
    print_table(table)
    assert capsys.readouterr().out.count(SHOWN) == 4


@pytest.mark.parametrize("width", [40, 90])
def test_tables_are_as_wide_as_columns_says(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table = new_table("long")
    table.add_row("word " * 60)
    print_table(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


def test_lines_and_bars_show_names_as_they_are() -> None:
    file = io.StringIO()
    lines = EpochLines(Console(file=file, width=200), NAME)
    lines.begin_epoch(1, 1, 1, 0)
    lines.end_epoch(ROW)
    assert file.getvalue().startswith(f"{SHOWN}: epoch 1/1")

    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=True)
    with Bars(PlainColumn("{task.description}"), console=console, auto_refresh=False) as bar:
        display = EpochBars(console, bar, NAME, 0, 1)
        display.begin_epoch(1, 1, 1, 0)
        display.note(NAME)
        bar.refresh()
    assert file.getvalue().count(SHOWN) >= 2


def test_the_display_of_a_run_takes_names_as_text() -> None:
    with watch(NAME) as display:
        assert isinstance(display.console, PlainConsole)
