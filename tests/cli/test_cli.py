"""The command line as a whole: help, versions, exit codes, defaults from a file."""

import errno
import subprocess
import sys
import types
from pathlib import Path

import pytest
from cli_tools import run

from senet import __main__, __version__
from senet.cli import COMMANDS
from senet.errors import SenetError, UserError

NAMES = [command.__name__ for command in COMMANDS]


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "senet", *arguments], capture_output=True, text=True, check=False
    )


def test_help_and_the_list_of_networks_load_no_pytorch() -> None:
    code = (
        "import sys; from senet.__main__ import main; main(['--help']); main(['models']); "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in NAMES)


def test_a_wrong_model_in_a_real_process() -> None:
    done = shell("summary", "resnet5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "senet summary: unknown model 'resnet5'; did you mean 'resnet50'?\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version").out.strip() == __version__


@pytest.mark.parametrize("name", NAMES)
def test_help_describes_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, name, "--help")
    assert found.code == 0
    for argument in __main__.app[name].assemble_argument_collection(parse_docstring=True):
        if argument.show:
            assert argument.name in found.out, argument.name
            assert argument.parameter.help, f"{name}: {argument.name} has no description"


def test_fixed_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "train", "--help").out
    for flag in (
        "--model", "--data", "--recipe", "--epochs", "--batch-size", "--lr", "--seed", "--out",
        "--resume", "--data-root", "--download", "--val-fraction", "--image-size",
        "--skip-bad-images", "--workers", "--checkpoint-steps", "--device", "--mixed-precision",
        "--reduction", "--squeeze", "--gate", "--integration", "--stages", "--config",
    ):  # fmt: skip
        assert f"{flag} " in text


def test_commands_of_later_issues_are_no_stubs(capsys: pytest.CaptureFixture[str]) -> None:
    designed = {"insert", "explain", "fold", "export", "bench", "ablate"}
    for name in designed - set(NAMES):
        found = run(capsys, name)
        assert found.code == 2
        assert found.err.startswith(f'senet: Unknown command "{name}"')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ['Did you mean "train"?']),
        (["train", "--epoch", "3"], ["--epoch", "Did you mean --epochs?"]),
        (["train", "--epochs", "three"], ["--epochs", "three"]),
        (["train", "--epochs", "1.5"], ["--epochs", "must be a whole number, got '1.5'"]),
        (["train", "--gate", "sigmod"], ["--gate", 'Did you mean "sigmoid"?']),
        (["train", "--stages", "2;3"], ["--stages", "whole numbers like 2,3"]),
        (["train", "resnet50"], ["resnet50"]),
        (["predict"], ["give a checkpoint, or --model"]),
        (["predict", "somewhere"], ["give images, or folders of them"]),
    ],
)
def test_bad_flags(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, *arguments)
    assert found.code == 2
    assert found.err.count("\n") == 1
    for word in words:
        assert word in found.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epoch = 3", ["[epoch]", "Did you mean --epochs?"]),
        ('epochs = "three"', ["[epochs]", "three"]),
        ("epochs = 1.5", ["[epochs]", "must be a whole number, got '1.5'"]),
        ("epochs = true", ["[epochs]", "must be a whole number"]),
        ("epochs = [1, 2]", ["[epochs]"]),
        ('download = "perhaps"', ["[download]", "perhaps"]),
        ("epochs 3", ["not a TOML file"]),
        ("[recipe]\nmomentun = 0.5", ["'momentun'", "did you mean 'momentum'?"]),
        ("[model_options]\nreductoin = 4", ["reductoin", "Did you mean --reduction?"]),
        ("model_options = 4", ["[model_options] must be a table"]),
    ],
)
def test_bad_config_file(
    content: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "defaults.toml"
    path.write_text(content)
    found = run(
        capsys, "train", "--config", path, "--model", "resnet8_cifar", "--out", tmp_path / "run",
        "--no-tune-allocator",
    )  # fmt: skip
    place = [] if "not a TOML file" in words else [f"{path}, line {len(content.splitlines())}: "]
    found.refused("train", *place, *words)
    assert not (tmp_path / "run").exists()


def test_missing_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "train", "--config", tmp_path / "no.toml")
    found.refused("train", "no.toml", "No such file")


def raised_elsewhere(kind: type[Exception]) -> None:
    """Raise as a library would: from a file outside the package."""
    raise kind("inside a library")


def test_library_errors_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in (ValueError, TypeError, RuntimeError):
        monkeypatch.setattr(__main__, "app", lambda *_, kind=kind, **__: raised_elsewhere(kind))
        with pytest.raises(kind, match="inside a library"):
            run(capsys, "models")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("wrong\n  place"), 2, "wrong place"),
        (SenetError("disk is full"), 1, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied: /x"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), 2, "File name too long: /x"),
        (
            RuntimeError("Storage size calculation overflowed\nwith more below"),
            2,
            "a number is too large for this machine, give smaller ones: Storage size calculation "
            "overflowed",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt("go on with: x"), 130, "go on with: x"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(__main__, "app", fail)
    found = run(capsys, "models")
    assert (found.code, found.out, found.err) == (code, "", f"senet models: {text}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("summary", "resnet8_cifar", "--num-classes", "9" * 20), "--num-classes: must be below"),
        (("summary", "resnet8_cifar", "--num-classes", "1" + "0" * 5000), "must be a whole number"),
        (("summary", "resnet8_cifar", "--num-classes", str(1 << 62)), "a number is too large"),
        (("summary", "resnet8_cifar", "--input", f"3,{10**12},{10**12}"), "a number is too large"),
        (("summary", "block", "--channels", "64", "--reduction", "1e-300"), "number is too large"),
        (("summary", "block", "--channels", "64", "--reduction", "inf"), "reduction must be posi"),
        (("summary", "se_resnet8_cifar", "--se", "--input", "3,-1,-1"), "--input must be C,H,W"),
        (("summary", "x" * 300), "File name too long"),
        (("insert", "--model", "resnet8_cifar", "--num-classes", "0", "--out", "x"), "at least 1"),
        (("train", "--resume", "nothing", "--scale-lr"), "--scale-lr belongs to the beginning"),
    ],
)
def test_numbers_and_names_that_nothing_can_hold(
    arguments: tuple[str, ...],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(capsys, *arguments)
    assert (found.code, found.out) == (2, "")
    assert text in found.err
    assert found.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_flags_are_not_blamed_on_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text("epochs = 0\nbatch-size = 0\n", encoding="utf-8")
    flags = ("train", "--config", str(config), "--data", "embedded", "--out", str(tmp_path / "x"))
    assert "c.toml, line 2: batch_size" in run(capsys, *flags, "--epochs", "1").err
    assert "train: batch_size" in run(capsys, *flags, "--epochs=1", "--batch-size", "-1").err


def test_a_folder_called_as_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet8_cifar").mkdir()
    assert "multiply-adds" in run(capsys, "summary", "resnet8_cifar").out
    (tmp_path / "resnet8_cifar" / "checkpoints").mkdir()
    assert "holds no checkpoint" in run(capsys, "summary", "resnet8_cifar").err


def test_warnings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def warn(*_: object, **__: object) -> None:
        for _ in range(2):
            warnings.warn("more workers\nthan cores", stacklevel=1)

    monkeypatch.setattr(__main__, "app", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        found = run(capsys, "models")
    assert (found.code, found.err) == (0, "senet models: warning: more workers than cores\n")


def test_a_closed_pipe_ends_quietly() -> None:
    done = subprocess.run(
        f"{sys.executable} -m senet train --help | head -1",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("Usage: senet train")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["compare"], ["evaluate", "nowhere"], ["predict", "nowhere", "no.png"]],
)
def test_allocator_is_tuned_unless_told_otherwise(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    module = types.ModuleType("senet.support.allocator")
    monkeypatch.setattr(module, "tune_allocator", lambda: calls.append("tuned"), raising=False)
    monkeypatch.setitem(sys.modules, "senet.support.allocator", module)
    assert run(capsys, *arguments, "--no-tune-allocator").code == 2
    assert calls == []
    assert run(capsys, *arguments).code == 2
    assert calls == ["tuned"]


@pytest.mark.parametrize("arguments", [("recipes",), ("--version",), ("recipes", "nosuch")])
def test_closed_streams(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    code = __main__.main(list(arguments))
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    assert code == (2 if "nosuch" in arguments else 0)


@pytest.mark.parametrize("columns", ["0", "1", "2"])
def test_no_width_is_an_unknown_one(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = run(capsys, "recipes").out
    monkeypatch.setenv("COLUMNS", columns)
    assert run(capsys, "recipes").out == usual
    monkeypatch.setenv("COLUMNS", columns)
    assert "--json" in run(capsys, "stats", "--help").out
