"""What people type who know timm, ultralytics or Lightning."""

import pytest
from cli_tools import run

import senet
from senet.cli import COMMANDS, app, elsewhere
from senet.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--freeze", 10), ["--freeze", "--train head"]),
        (("train", "--imgsz=224"), ["--image-size"]),
        (("train", "--drop_rate", 0.1), ["--dropout"]),
        (("train", "--num-classes", 3), ["the data say"]),
        (("predict", "run", "image.jpg", "--topk", 3), ["--top"]),
        (("train", "--epoch", 3), ["Did you mean --epochs"]),
    ],
)
def test_flags(
    arguments: tuple[object, ...], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, *arguments).refused(str(arguments[0]), *words)


def test_what_is_said_exists() -> None:
    """No remedy names a flag that no command has."""
    names: set[str] = set()
    for command in COMMANDS:
        collection = app[command.__name__].assemble_argument_collection(parse_docstring=False)
        names |= {name for argument in collection for name in argument.names}
    said = [*elsewhere._OF_TRAINING.values(), *elsewhere._OF_ALL.values()]
    flags = {text.split()[0] for text in said if text.startswith("--")}
    assert flags <= names
    foreign = {f"--{name}" for name in elsewhere._OF_TRAINING}
    train = app["train"].assemble_argument_collection(parse_docstring=False)
    assert not foreign & {name for argument in train for name in argument.names}


def test_who_knows_a_flag_from_one_command_finds_it_in_the_others() -> None:
    """--data, --model, --weights and --out mean the same wherever they have a use."""
    flags = {
        command.__name__: {
            name
            for argument in app[command.__name__].assemble_argument_collection(
                parse_docstring=False
            )
            for name in argument.names
        }
        for command in COMMANDS
    }
    images = "train compare ablate evaluate predict explain fold export stats shard"
    networks = "train compare ablate evaluate predict summary insert explain fold optimize export"
    trained = "train evaluate predict insert explain fold optimize export"
    written = "train compare ablate insert explain fold optimize export shard"
    for flag, commands in {
        "--data": images,
        "--model": networks,
        "--weights": trained,
        "--out": written,
    }.items():
        assert [name for name in commands.split() if flag not in flags[name]] == [], flag


@pytest.mark.parametrize(
    ("option", "here"),
    [("in_chans", "in_channels"), ("drop_rate", "dropout"), ("global_pool", "num_classes=0")],
)
def test_options_of_networks(option: str, here: str) -> None:
    with pytest.raises(UserError, match=here):
        senet.create_model("se_resnet18", **{option: 1})
