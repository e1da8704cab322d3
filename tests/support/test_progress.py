"""What a long run shows on a terminal and in a file."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from senet.support.progress import EpochBars, EpochLines, watch
from senet.support.progress import Progress as Watcher

ROW = {"train_loss": 1.25, "val_loss": 1.5, "top1": 61.0, "top5": 99.5}


def epoch(display: Watcher, number: int, done: int = 0) -> None:
    """An epoch of 4 steps of 10 images and one batch of validation."""
    display.begin_epoch(number, 3, 4, done)
    for _ in range(4 - done):
        display.step(10, 1.0, 0.1)
    display.begin_evaluation(1)
    display.evaluated(10)
    display.end_epoch(ROW)


def test_a_line_an_epoch() -> None:
    file = io.StringIO()
    display = EpochLines(Console(file=file, width=40), "net seed 1")
    epoch(display, 1)
    epoch(display, 2)
    lines = file.getvalue().splitlines()  # whole, though the console is narrow
    assert len(lines) == 2
    assert lines[1].startswith(
        "net seed 1: epoch 2/3  loss 1.250  val loss 1.500  top-1 61.00%  top-5 99.50%"
    )
    assert "images/s" in lines[1]


def test_no_speed_where_nothing_was_trained() -> None:
    file = io.StringIO()
    epoch(EpochLines(Console(file=file)), 1, done=4)
    assert "top-5 99.50%" in file.getvalue()
    assert "images/s" not in file.getvalue()


def test_notes_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    EpochLines(Console(file=io.StringIO())).note("two images are left out")
    assert capsys.readouterr() == ("", "senet: two images are left out\n")


def bars(runs_done: int, runs: int) -> tuple[EpochBars, Progress, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True)
    bar = Progress(console=console, auto_refresh=False)
    return EpochBars(console, bar, "net", runs_done, runs), bar, file


def test_the_bar_counts_the_steps_of_all_runs() -> None:
    display, bar, _ = bars(runs_done=2, runs=6)
    epoch(display, 1)
    task = bar.tasks[0]
    assert (task.completed, task.total) == ((2 * 3 + 1) * 4, 6 * 3 * 4)
    display.begin_epoch(2, 3, 4, 3)  # resumed in the middle of an epoch
    assert bar.tasks[0].completed == (2 * 3 + 1) * 4 + 3
    assert bar.tasks[0].description == "net: epoch 2/3"
    display.step(10, 0.5, 0.1)
    assert "images/s, loss 0.500" in bar.tasks[0].fields["rate"]
    display.close()
    assert not bar.tasks


def test_the_bar_counts_batches_where_there_is_no_training() -> None:
    display, bar, _ = bars(0, 1)
    display.begin_evaluation(5)
    display.evaluated(10)
    display.evaluated(10)
    assert (bar.tasks[0].completed, bar.tasks[0].total) == (2, 5)


def test_a_note_stands_above_the_bar() -> None:
    display, _, file = bars(0, 1)
    display.note("the run had 2 threads")
    assert "senet: the run had 2 threads" in file.getvalue()


def test_watch_is_quiet_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with watch("net") as display:
        assert type(display) is EpochLines
        epoch(display, 1)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "\x1b" not in out


def test_watch_shows_bars_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with watch("net") as display:
        assert isinstance(display, EpochBars)
        epoch(display, 1)
    assert "top-1 61.00%" in capsys.readouterr().out
