"""`senet summary` in few columns."""

import pytest
from cli_tools import run

from senet.cli.summary import fitted


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_summary_is_as_wide_as_columns_says(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    found = run(capsys, "summary", "se_resnet8_cifar")
    assert found.code == 0, found.err
    lines = found.out.splitlines()[:-1]  # the sums are a sentence
    assert max(map(len, lines)) <= width
    conv = next(line for line in lines if "Conv2d" in line and "1, 16, 32, 32" in line)
    assert [word for word in conv.split() if word == "432"]  # parameters of the first convolution
    assert "[3, 3]" in conv


def test_a_wide_terminal_shows_the_table_as_it_is() -> None:
    table = "=====\nLayer (type)   Output Shape   Param #\n=====\nA (a)          [1]            5"
    assert fitted(table, 100) == table
    assert fitted(table, 30).splitlines()[3].split() == ["A", "(a)", "[1]", "5"]
