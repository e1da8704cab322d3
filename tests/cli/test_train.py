"""`senet train`: runs, resumes, configuration files, and every kind of bad input."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from cli_tools import make_data, make_images, run, train_flags
from tests.helpers.marks import separate_passes


def test_run_folder(trained: Path) -> None:
    for name in (
        "config.toml",
        "metrics.csv",
        "checkpoints/last/model.safetensors",
        "checkpoints/best/model.safetensors",
        "figures/learning_curves.png",
        "figures/confusion_matrix.svg",
        "figures/gates_per_stage.png",
    ):
        assert (trained / name).is_file(), name
    assert len((trained / "metrics.csv").read_text().splitlines()) == 3
    assert list((trained / "tensorboard").iterdir())


def test_flags_reach_the_run(trained: Path) -> None:
    config = tomllib.loads((trained / "config.toml").read_text())
    assert config["model"] == "se_resnet8_cifar"
    assert config["model_options"] == {"reduction": 4}
    assert config["recipe"]["name"] == "quick"
    assert {key: config["recipe"][key] for key in ("epochs", "batch_size", "lr")} == {
        "epochs": 2,
        "batch_size": 8,
        "lr": 0.05,
    }


def test_output_without_a_terminal(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, *train_flags(data, tmp_path / "run"))
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "images/s" in lines[1]
    assert lines[-1] == f"Run: {tmp_path / 'run'}"
    assert len(lines) == 4


def test_config_of_a_run_reruns_it_exactly(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    found = run(
        capsys, "train", "--config", trained / "config.toml", "--out", again, "--no-tune-allocator"
    )
    assert found.code == 0, found.err
    for name in ("metrics.csv", "checkpoints/last/model.safetensors"):
        assert (again / name).read_bytes() == (trained / name).read_bytes()


def test_flags_win_over_the_config_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained / "config.toml"
    out = tmp_path / "run"
    found = run(
        capsys, "train", "--config", path, "--out", out, "--epochs", 1, "--reduction", 2, "--seed",
        7, "--no-tune-allocator",
    )  # fmt: skip
    assert found.code == 0, found.err
    new, old = (tomllib.loads((folder / "config.toml").read_text()) for folder in (out, trained))
    assert (new["seed"], new["model_options"]["reduction"]) == (7, 2)
    assert new["recipe"]["epochs"] == 1
    assert new["recipe"]["warmup_epochs"] == old["recipe"]["warmup_epochs"] / 2
    assert new["recipe"]["lr"] == old["recipe"]["lr"]


def test_a_file_of_flags_and_part_of_a_recipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "defaults.toml"
    path.write_text(
        f'model = "resnet8_cifar"\ndata = "{data}"\nbatch-size = 8\nepochs = 1\nworkers = 0\n'
        'crop = "random_resized"\nscale = [0.5, 1.0]\ncutmix = 0.5\n[recipe]\nmomentum = 0.5\n'
    )
    out = tmp_path / "run"
    found = run(capsys, "train", "--config", path, "--out", out, "--no-tune-allocator")
    assert found.code == 0, found.err
    recipe = tomllib.loads((out / "config.toml").read_text())["recipe"]
    assert (recipe["name"], recipe["momentum"], recipe["batch_size"]) == ("quick", 0.5, 8)
    assert recipe["augmentation"]["scale"] == [0.5, 1.0]
    assert recipe["augmentation"]["cutmix"] == 0.5


def test_resume_of_a_finished_run_changes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    found = run(capsys, "train", "--resume", copy, "--no-tune-allocator")
    assert found.code == 0, found.err
    for name in ("metrics.csv", "checkpoints/last/model.safetensors"):
        assert (copy / name).read_bytes() == (trained / name).read_bytes()


def test_interrupt_names_the_command_that_resumes(
    data: Path,
    tmp_path: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import signal

    from senet.support.progress import EpochLines

    presses = iter([signal.SIGINT])  # once: a second one would stop without a checkpoint

    def press_ctrl_c(self: EpochLines, images: int, loss: float, lr: float) -> None:
        for number in presses:
            signal.raise_signal(number)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(EpochLines, "step", press_ctrl_c)
        found = run(capsys, *train_flags(data, out))
    assert found.code == 130
    assert found.err.splitlines()[-1].startswith("senet train: stopped")
    assert found.err.endswith(f"senet train --resume {out}\n")
    assert run(capsys, "train", "--resume", out, "--no-tune-allocator").code == 0
    assert (out / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()


def changed(flags: list[object], **changes: object) -> list[object]:
    flags = list(flags)
    for name, value in changes.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "se_resnet8_cifr"}, ["unknown model", "did you mean 'se_resnet8_cifar'?"]),
        ({"data": "cifar1O"}, ["unknown data set 'cifar1O'", "did you mean 'cifar10'?"]),
        ({"recipe": "quik"}, ["unknown recipe 'quik'", "did you mean 'quick'?"]),
        ({"epochs": 0}, ["epochs", "at least 1", "got 0"]),
        ({"batch-size": 1000}, ["batch_size 1000", "at most 24"]),
        ({"lr": -1}, ["lr", "got -1"]),
        ({"seed": -1}, ["seed", "got -1"]),
        ({"reduction": 0}, ["reduction", "got 0"]),
        ({"device": "gpu"}, ["--device", "cuda"]),
        ({"model": "resnet8_cifar"}, ["no SE blocks", "'reduction'", "se_resnet8_cifar"]),
    ],
)
def test_bad_values(
    changes: dict[str, object],
    words: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    found = run(capsys, *changed(train_flags(data, out), **changes))
    found.refused("train", *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('nesterov = "no"', "nesterov must be true or false, got 'no'"),
        ("step_epochs = 5", "step_epochs must be a list of numbers, got 5"),
        ("optimizer = 5", "optimizer must be text in quotes, got 5"),
        ("augmentation = 5", "augmentation must be a table such as {flip = true}, got 5"),
        ('augmentation.flip = "no"', "flip must be true or false, not 'no'"),
        ('[recipe.augmentation]\nmixup = "a"', "mixup must be a number, not 'a'"),
    ],
)
def test_values_of_other_types_in_a_table_of_the_recipe(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'[recipe]\nepochs = 2\nbatch_size = 4\nlr = 0.1\nschedule = "cosine"\n{line}\n'
    )
    found = run(capsys, "train", "--config", config, "--data", tmp_path / "absent",
                "--out", tmp_path / "run")  # fmt: skip
    found.refused("train", f"{config}, line {6 + line.count(chr(10))}: {words}")


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"

    def refused(data: Path, *words: str) -> None:
        run(capsys, *train_flags(data, out)).refused("train", *words)
        assert not out.exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, str(empty))

    hollow = make_data(tmp_path / "hollow")
    (hollow / "train" / "yellow").mkdir()
    (hollow / "val" / "yellow").mkdir()
    refused(hollow, "yellow")

    mismatch = make_data(tmp_path / "mismatch")
    (mismatch / "val" / "red").rename(mismatch / "val" / "rot")
    refused(mismatch, "rot")

    broken = make_data(tmp_path / "broken")
    image = broken / "train" / "red" / "3.jpg"
    from PIL import Image

    Image.new("RGB", (16, 16)).save(image)
    image.write_bytes(image.read_bytes()[:-200])
    refused(broken, str(image))
    found = run(capsys, *train_flags(broken, out), "--skip-bad-images")
    assert found.code == 0, found.err
    assert "left out: 1" in found.err
    judged = json.loads(run(capsys, "evaluate", out, "--json").out)
    assert (judged["n"], judged["skipped"]) == (12, [])
    table = run(capsys, "evaluate", out, "--data", broken, "--split", "train", "--skip-bad-images")
    assert "1 image was left out: unreadable" in table.out


def test_image_smaller_than_the_network_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", side=16)
    flags = changed(train_flags(data, tmp_path / "run"), model="se_resnet18")
    run(capsys, *flags).refused("train", "se_resnet18", "32×32", "16×16")


def test_one_folder_needs_val_fraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_images(tmp_path / "all")
    flags = train_flags(data, tmp_path / "run")
    run(capsys, *flags).refused("train", "val")
    assert run(capsys, *flags, "--val-fraction", 0.25).code == 0


def test_existing_run_folder_is_never_overwritten(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "metrics.csv").read_bytes()
    found = run(capsys, *train_flags(data, trained))
    found.refused("train", str(trained), "exists", f"senet train --resume {trained}")
    assert (trained / "metrics.csv").read_bytes() == before


def test_unwritable_run_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file where a folder should be: unwritable for root too, unlike a folder without write bits.
    (tmp_path / "file").write_text("")
    found = run(capsys, *train_flags(data, tmp_path / "file" / "run"))
    found.refused("train", str(tmp_path / "file" / "run"))


def test_resume_refuses_other_options(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--lr", 0.01], ["--seed", 5], ["--gate", "tanh"], ["--workers", 1]):
        found = run(capsys, "train", "--resume", trained, *flags, "--no-tune-allocator")
        found.refused("train", "--resume")


def test_resume_takes_no_config_file(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = trained / "config.toml"
    found = run(capsys, "train", "--resume", trained, "--config", config, "--no-tune-allocator")
    found.refused("train", "leave out --config")


def test_resume_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "train", "--resume", tmp_path, "--no-tune-allocator")
    found.refused("train", str(tmp_path), "config.toml")


def test_what_is_left_open_is_chosen_and_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (data.name, f"{data.name}-2"):
        found = run(capsys, "train", "--data", data, "--epochs", 1, "--no-tune-allocator")
        assert found.code == 0, found.err
        told = (
            "recipe quick",
            f"runs/{name} (",
            "se_resnet20_cifar",
            "batches of 8",
            "24 training",
        )
        for words in told:
            assert words in found.err
        config = tomllib.loads((tmp_path / "runs" / name / "config.toml").read_text())
        assert (config["model"], config["recipe"]["batch_size"]) == ("se_resnet20_cifar", 8)
        assert config["recipe"]["lr"] == pytest.approx(0.2 * 8 / 128)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = run(capsys, "train", "--data", data, "--no-tune-allocator")
    assert found.code == 2
    assert "--out is needed" in found.err


def test_nothing_at_all_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "train", "--no-tune-allocator").refused("train", "--data is needed")


def test_starting_from_a_run_fine_tunes(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    found = run(
        capsys, "train", "--weights", trained, "--data", data, "--epochs", 1, "--out", out,
        "--no-tune-allocator",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "recipe finetune" in found.err
    recipe = tomllib.loads((out / "config.toml").read_text())["recipe"]
    assert (recipe["name"], recipe["optimizer"], recipe["batch_size"]) == ("finetune", "adamw", 8)
    assert recipe["lr"] == pytest.approx(1e-3 * (8 / 64) ** 0.5)


@separate_passes
def test_each_field_of_a_recipe_is_a_flag(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "optimizer": "adamw", "schedule": "linear", "warmup-epochs": 0.25, "momentum": 0.8,
        "beta2": 0.95, "layer-decay": 0.9, "grad-clip": 2, "ema": 0.5, "weight-decay": 0.01,
        "label-smoothing": 0.1, "class-weights": "balanced", "drop-path": 0.1,
        "crop": "random_resized", "crop-scale": "0.5,1", "mixup": 0.1, "cutmix": 1,
        "policy": "trivialaugment", "patience": 3,
    }  # fmt: skip
    out = tmp_path / "run"
    given = [text for name, value in flags.items() for text in (f"--{name}", value)]
    found = run(capsys, *train_flags(data, out), *given, "--no-flip", "--no-decay-norm-and-bias")
    assert found.code == 0, found.err
    recipe = tomllib.loads((out / "config.toml").read_text())["recipe"]
    images = recipe.pop("augmentation")
    renamed = {"ema": "ema_decay", "crop_scale": "scale"}
    for name, value in flags.items():
        key = name.replace("-", "_")
        key = renamed.get(key, key)
        expected = [0.5, 1.0] if name == "crop-scale" else value
        assert (images if key in images else recipe)[key] == expected, name
    assert images["flip"] is False
    assert recipe["decay_norm_and_bias"] is False


def test_none_takes_an_optional_field_away(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = changed(train_flags(data, tmp_path / "run"), recipe="imagenet-modern")
    found = run(capsys, *flags, "--ema-decay", "none", "--randaugment", "none")
    assert found.code == 0, found.err
    recipe = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["recipe"]
    assert "ema_decay" not in recipe
    assert "randaugment" not in recipe["augmentation"]


def test_every_field_has_a_flag_with_its_help() -> None:
    from dataclasses import fields

    from senet.cli.options import RecipeFlags
    from senet.cli.recipe_flags import helps_of
    from senet.data import Augmentation
    from senet.training.recipe import Recipe

    for owner in (Recipe, Augmentation):
        for each in fields(owner):
            assert helps_of(owner)[each.name], each.name
            if each.name not in ("name", "augmentation"):
                assert hasattr(RecipeFlags(), each.name)


@pytest.mark.parametrize("arguments", [(), ("finetune",), ("cifar", "--json")])
def test_recipes(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "recipes", *arguments)
    assert found.code == 0
    expected = {(): ["imagenet-modern", "adamw"], ("finetune",): ["--new-layer-lr", "10"]}
    for word in expected.get(arguments, ['"step_gamma": 0.2']):
        assert word in found.out
    run(capsys, "recipes", "finetun").refused("recipes", "did you mean 'finetune'")


def test_a_run_does_not_become_its_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = make_images(tmp_path / "flat", each=4)
    before = sorted(flat.iterdir())
    flags = [*train_flags(flat, flat / "run"), "--val-fraction", 0.25]
    run(capsys, *flags).refused("train", f"{flat}/run would lie in {flat}", "give a place outside")
    without = [flag for flag in flags if flag not in ("--out", flat / "run")]
    monkeypatch.chdir(flat)
    run(capsys, *without).refused("train", "runs/flat would lie in", "by --out")
    for command in (("compare",), ("ablate", "squeeze")):
        found = run(capsys, *command, "--data", flat, "--val-fraction", 0.25, "--out", flat / "c")
        found.refused(command[0], f"{flat}/c would lie in {flat}")
    assert sorted(flat.iterdir()) == before
