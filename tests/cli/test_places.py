"""Data where people have them: seen from other folders, moved, only to evaluate, for colours."""

import json
from pathlib import Path

import pytest
from cli_tools import CLASSES, make_data, make_images, run, train_flags
from PIL import Image

from senet.checkpoint.files import open_checkpoint
from senet.data import absolute_data
from senet.experiments.compare import CompareConfig
from senet.training.config import RunConfig


def test_a_run_finds_its_data_from_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    make_data(here / "m")
    make_images(there / "m" / "train", each=3)  # others of the same name
    make_images(there / "m" / "val", each=3)
    monkeypatch.chdir(here)
    flags = train_flags(Path("m"), Path("r"))
    flags[flags.index("--epochs") + 1] = 1
    assert run(capsys, *flags).code == 0
    config = RunConfig.from_toml(here / "r" / "config.toml")
    assert (config.data, config.data_root) == (str(here / "m"), str(here / "data"))
    monkeypatch.chdir(there)
    judged = json.loads(run(capsys, "evaluate", here / "r", "--json").out)
    assert (judged["n"], judged["data"]) == (12, str(here / "m"))
    other = run(capsys, "train", "--resume", here / "r", "--data", "m")
    other.refused("train", "is not what it was when the run began")
    monkeypatch.chdir(here)
    assert run(capsys, "train", "--resume", "r", "--data", "m").code == 0  # the same, once more

    (here / "m").rename(tmp_path / "moved")
    run(capsys, "evaluate", "r").refused("evaluate", f"{here}/m, which is not there: give --data")
    assert run(capsys, "train", "--resume", "r").code == 2
    assert run(capsys, "train", "--resume", "r", "--data", "../moved").code == 0
    assert RunConfig.from_toml(here / "r" / "config.toml").data == str(tmp_path / "moved")
    assert run(capsys, "train", "--resume", "r").code == 0  # without naming it again
    assert json.loads(run(capsys, "evaluate", "r", "--data", "../moved", "--json").out)["n"] == 12
    named = run(capsys, "train", "--resume", "r", "--data", "embedded")
    named.refused("train", "data is")


def test_a_comparison_keeps_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path)
    config = CompareConfig(out=Path("c"), data="m", data_options={"data_root": Path("d")})
    Path("c/config.toml").write_text(config.to_toml())
    monkeypatch.chdir("/")
    (first, *_), _ = CompareConfig.of_folder(tmp_path / "c", refused={}).runs().values()
    assert (first.data, first.data_root) == (str(tmp_path / "m"), str(tmp_path / "d"))


def test_labelled_images_to_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "m")
    make_images(data / "test", each=2)
    assert run(capsys, *train_flags(data, tmp_path / "r")).code == 0

    def count(*arguments: object) -> int:
        outcome = run(capsys, "evaluate", tmp_path / "r", "--json", *arguments)
        assert outcome.code == 0, outcome.err
        return int(json.loads(outcome.out)["n"])

    assert count() == count("--split", "val") == 12
    assert count("--split", "test") == count("--data", data / "test") == 6
    assert count("--split", "train") == 24
    judge = ["evaluate", tmp_path / "r", "--json", "--data"]
    whole = json.loads(run(capsys, *judge, data / "test").out)
    some = make_images(tmp_path / "some", classes=CLASSES[1:], each=2)  # green alone would be 0
    part = json.loads(run(capsys, *judge, some).out)
    assert part["classes"] == whole["classes"] == list(CLASSES)
    assert [sum(row) for row in part["confusion"]] == [0, 2, 2]
    rows = [f"test/{name}/{n}.png,{name}" for name in CLASSES for n in range(2)]
    (data / "table.csv").write_text("\n".join(["file,label", *rows]))
    assert count("--data", data / "table.csv") == 6
    unknown = make_images(tmp_path / "unknown", classes=("green", "pink"))
    outcome = run(capsys, "evaluate", tmp_path / "r", "--data", unknown)
    outcome.refused("evaluate", "'pink' only in", "'blue', 'green', 'red'")


def test_grey_images_for_a_network_of_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "m")
    assert run(capsys, *train_flags(data, tmp_path / "r")).code == 0
    for path in data.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert run(capsys, "evaluate", tmp_path / "r").code == 0
    flags = train_flags(data, tmp_path / "s")
    start = [*flags[:1], *flags[5:], "--init", tmp_path / "r"]
    outcome = run(capsys, *start)
    assert outcome.code == 0, outcome.err
    assert open_checkpoint(tmp_path / "s").preprocessing.channels == 3
    outcome = run(capsys, *train_flags(data, tmp_path / "t"), "--channels", 3)
    assert outcome.code == 0, outcome.err
    assert open_checkpoint(tmp_path / "t").model.config["in_channels"] == 3
    assert run(capsys, *train_flags(data, tmp_path / "u")).code == 0
    assert open_checkpoint(tmp_path / "u").model.config["in_channels"] == 1


NET = """
from torch import nn

def small(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
"""


def test_the_same_command_goes_on_with_what_it_named_from_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path / "m")
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    flags = train_flags(Path("m"), Path("r"))
    flags[flags.index("--epochs") + 1] = 1
    flags[flags.index("--model") + 1] = "net.py:small"
    del flags[flags.index("--reduction") : flags.index("--reduction") + 2]
    begun = [*flags, "--resume", "auto"]
    going_on = [*flags[:1], *flags[3:], "--init", "r", "--resume", "auto"]
    going_on[going_on.index(Path("r"))] = "s"
    for command in (begun, going_on):
        for _ in range(2):
            found = run(capsys, *command)
            assert found.code == 0, found.err
    (tmp_path / "t").mkdir()
    refused = run(capsys, "train", "--resume", "s", "--model", "net.py:small", "--init", "t")
    refused.refused("train", f"init is '{tmp_path}/r' there and '{tmp_path}/t' here")


def test_whole_paths_of_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "t.csv").touch()
    monkeypatch.chdir(tmp_path)
    for prefix in ("", "shards:", "hf:", "hf-stream:"):
        assert absolute_data(f"{prefix}m") == f"{prefix}{tmp_path}/m"
    assert absolute_data("hf:m:main") == f"hf:{tmp_path}/m:main"
    assert absolute_data("t.csv") == f"{tmp_path}/t.csv"
    pattern = "train-{000000..000009}.tar"
    assert absolute_data(f"shards:m/{pattern}") == f"shards:{tmp_path}/m/{pattern}"
    for elsewhere in ("embedded", "cifar10", "hf:owner/name", "shards:https://host/m", "absent"):
        assert absolute_data(elsewhere) == elsewhere
    (tmp_path / "cifar10").mkdir()
    assert absolute_data("cifar10") == "cifar10"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    data = make_data(tmp_path / "m")
    config = tmp_path / "c.toml"
    config.write_text('epochs = 1\nrecipe = "quick"\n', encoding=encoding)
    flags = train_flags(data, tmp_path / "r")
    flags[flags.index("--epochs") : flags.index("--epochs") + 2] = []
    assert run(capsys, *flags, "--config", config).code == 0
    run_config = tmp_path / "r" / "config.toml"
    text = run_config.read_text()
    assert RunConfig.from_toml(run_config).recipe.epochs == 1
    run_config.write_text(text, encoding=encoding)
    assert RunConfig.from_toml(run_config).recipe.epochs == 1
    assert run(capsys, "train", "--resume", tmp_path / "r").code == 0
    config.write_text("epocs = 1\n", encoding=encoding)
    run(capsys, *flags, "--config", config).refused("train", "c.toml, line 1: ", "epochs")


def test_a_place_that_config_toml_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "caf\udce9")
    outcome = run(capsys, *train_flags(data, tmp_path / "r"))
    outcome.refused("train", r"caf\xe9 has bytes that are not UTF-8", "rename it")
