"""Training: what it writes, what it learns, what it refuses and how it fails."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from senet.checkpoint.files import open_checkpoint
from senet.checkpoint.write import defect
from senet.data import Augmentation, load_data, val_loader
from senet.errors import SenetError, UserError
from senet.support.device import choose_device
from senet.training.config import RunConfig
from senet.training.evaluation import evaluate
from senet.training.loop import train
from senet.training.session import Session

Make = Callable[..., RunConfig]


class Recorder:
    """Keeps every call of the progress."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rows: list[Mapping[str, float]] = []
        self.notes: list[str] = []
        self.rates: list[float] = []
        self.images = 0

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        self.calls.append(f"epoch {epoch}/{epochs} of {steps} from {done}")

    def step(self, images: int, loss: float, lr: float) -> None:
        self.calls.append("step")
        self.images += images
        self.rates.append(lr)

    def begin_evaluation(self, batches: int) -> None:
        self.calls.append(f"evaluate {batches}")

    def evaluated(self, images: int) -> None:
        self.calls.append(f"evaluated {images}")

    def end_epoch(self, row: Mapping[str, float]) -> None:
        self.calls.append("end")
        self.rows.append(row)

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_run_folder_and_result(tiny_config: Make) -> None:
    config, seen = tiny_config(), Recorder()
    result = train(config, progress=seen)
    epoch = ["step"] * 6 + ["evaluate 2", "evaluated 8", "evaluated 4", "end"]
    assert seen.calls == ["epoch 1/2 of 6 from 0", *epoch, "epoch 2/2 of 6 from 0", *epoch]
    assert seen.images == 2 * 6 * 8
    assert seen.notes == ["there are 3 classes: top-5 counts the top 3, always 100%"]
    assert seen.rates[0] == pytest.approx(0.0005)  # of the step itself, not of the next one
    assert [path.name for path in sorted(config.out.iterdir())] == [
        ".lock",
        "checkpoints",
        "config.toml",
        "figures",
        "metrics.csv",
        "tensorboard",
        "timings.csv",
    ]
    assert {path.name for path in (config.out / "checkpoints").iterdir()} == {
        "best",
        "last",
        "previous",
    }
    with (config.out / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == list(result.history) == seen.rows
    assert list(rows[0]) == [
        "epoch",
        "step",
        "lr",
        "train_loss",
        "train_top1",
        "val_loss",
        "top1",
        "top5",
    ]
    assert [row["step"] for row in rows] == [6, 12]
    assert result.best_top1 == max(row["top1"] for row in rows)
    assert rows[result.best_epoch - 1]["top1"] == result.best_top1
    assert result.evaluation.n == 12
    assert result.evaluation.k == 3
    assert result.images_per_second > 0
    assert 0 < result.seconds < 60
    with (config.out / "timings.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_it_learns(tiny_config: Make) -> None:
    """The classes of the tiny data differ in colour; a few epochs tell them apart."""
    config = tiny_config(
        recipe_epochs=8,
        recipe_ema_decay=None,
        recipe_augmentation=Augmentation(),
        checkpoint_steps=0,
    )
    result = train(config)
    assert result.best_top1 > 90
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]


def test_config_reruns_exactly(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config()
    train(config)
    again = RunConfig.from_toml(config.out / "config.toml", out=tmp_path / "again")
    assert again.recipe == config.recipe
    train(again)
    for name in ("metrics.csv", "checkpoints/best/model.safetensors"):
        assert (config.out / name).read_bytes() == (again.out / name).read_bytes()


def test_seed_matters(tiny_config: Make, tmp_path: Path) -> None:
    one = train(tiny_config())
    other = train(tiny_config(seed=1, out=tmp_path / "other"))
    assert one.history != other.history


def test_workers_do_not_matter(tiny_config: Make, tmp_path: Path) -> None:
    one = train(tiny_config())
    other = train(tiny_config(num_workers=1, out=tmp_path / "other"))
    assert one.history == other.history


def test_best_is_the_best_and_last_the_last(tiny_config: Make) -> None:
    result = train(tiny_config(recipe_epochs=5, checkpoint_steps=0))
    best = open_checkpoint(result.run)
    assert best.path == result.run / "checkpoints" / "best" / "model.safetensors"
    assert best.metrics["epoch"] == result.best_epoch
    assert best.metrics["top1"] == result.best_top1
    last = open_checkpoint(result.run / "checkpoints" / "last")
    assert last.metrics == result.history[-1]


def test_checkpoint_evaluates_to_its_metrics(tiny_config: Make) -> None:
    """What is saved is what was judged: the moving average, not the raw weights."""
    config = tiny_config()
    result = train(config)
    last = open_checkpoint(result.run / "checkpoints" / "last")
    data = load_data(config.data)
    assert last.classes == data.classes == ("ant", "bee", "cow")
    assert last.preprocessing == data.preprocessing
    judged = evaluate(last.model, val_loader(data, batch_size=12, num_workers=0), last.task)
    assert judged.top1 == result.evaluation.top1
    assert judged.loss == pytest.approx(result.evaluation.loss, rel=1e-5)
    state = torch.load(result.run / "checkpoints" / "last" / "training_state.pt", weights_only=True)
    saved = load_file(result.run / "checkpoints" / "last" / "model.safetensors")
    assert saved.keys() == state["model"].keys()
    assert not torch.equal(saved["fc.weight"], state["model"]["fc.weight"])
    assert torch.equal(saved["fc.weight"], state["ema"]["module.fc.weight"])


def test_mean_normalisation(tiny_config: Make) -> None:
    session = Session(tiny_config(recipe_normalisation="mean"))
    plain = load_data(session.config.data).preprocessing
    assert session.data.preprocessing.mean == plain.mean
    assert session.data.preprocessing.std == (1.0, 1.0, 1.0)
    images, _ = next(iter(session.val_loader))
    assert float(images.max() - images.min()) <= 1.0


def test_gradient_is_clipped(tiny_config: Make) -> None:
    limits = {"recipe_grad_clip": 1e-3, "recipe_momentum": 0.0, "recipe_nesterov": False}
    config = tiny_config(**limits, recipe_weight_decay=0.0, recipe_warmup_epochs=0.0)
    session = Session(config)
    before = [p.detach().clone() for p in session.model.parameters()]
    images, targets = next(session.batches(0))
    session.train_step(images, targets, 1)
    change = [p.detach() - b for p, b in zip(session.model.parameters(), before, strict=True)]
    norm = float(torch.stack([c.square().sum() for c in change]).sum().sqrt())
    assert norm == pytest.approx(1e-3 * config.recipe.lr, rel=1e-3)


def test_label_smoothing_and_weights_are_channels_last(tiny_config: Make) -> None:
    smooth = Session(tiny_config(recipe_label_smoothing=0.5))
    plain = Session(tiny_config())
    images, targets = next(plain.batches(0))
    losses = [each.finished(each.train_step(images, targets, 1)) for each in (smooth, plain)]
    assert losses[0] != losses[1]
    weight = plain.model.get_parameter("layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_bf16_trains(tiny_config: Make) -> None:
    result = train(tiny_config(recipe_mixed_precision="bf16"))
    assert all(row["train_loss"] < 3 for row in result.history)


def test_compiled_training(tiny_config: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """--compile puts torch.compile around the network; without Inductor the numbers stay."""
    asked: list[dict[str, Any]] = []
    real = torch.compile

    def compiled(module: Any, **options: Any) -> Any:
        asked.append(options)
        return real(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compiled)
    plain = train(tiny_config(recipe_epochs=1))
    assert asked == []
    config = tiny_config(recipe_epochs=1, compile=True, out=tmp_path / "compiled")
    result = train(config)
    assert asked == [{"dynamic": False}]
    assert result.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], 1e-4)
    names = load_file(config.out / "checkpoints/last/model.safetensors").keys()
    assert not any("_orig_mod" in name for name in names)
    assert RunConfig.from_toml(config.out / "config.toml").compile
    assert "compile" not in tiny_config().result_options()


def test_diverging_loss_stops_and_keeps_the_last_checkpoint(tiny_config: Make) -> None:
    config = tiny_config(
        recipe_lr=1e20,
        recipe_grad_clip=None,
        recipe_schedule="step",
        recipe_step_epochs=(1.99,),
        recipe_warmup_epochs=0.0,
        checkpoint_steps=1,
    )
    with pytest.raises(SenetError, match=r"at step \d+ \(epoch 1, lr 1e\+20\); the last good"):
        train(config)
    for slot in (config.out / "checkpoints").iterdir():
        assert defect(slot) is None
        weights = load_file(slot / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_weights_that_are_not_finite_are_never_saved(tiny_config: Make) -> None:
    class Poison(Recorder):
        def step(self, images: int, loss: float, lr: float) -> None:
            super().step(images, loss, lr)
            if self.images == 8 * 8:
                with torch.no_grad():
                    session_of_run[0].model.get_parameter("fc.bias")[0] = torch.nan

    session_of_run: list[Session] = []
    original = Session.__init__

    def remember(self: Session, *arguments: Any) -> None:
        original(self, *arguments)
        session_of_run.append(self)

    config = tiny_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", remember)
        with pytest.raises(SenetError, match=r"fc.bias is not finite at step 8 \(epoch 2"):
            train(config, progress=Poison())
    state = config.out / "checkpoints" / "last" / "training_state.pt"
    assert torch.load(state, weights_only=True)["position"]["step"] == 6


def test_existing_run_folder_is_refused(tiny_config: Make) -> None:
    config = tiny_config()
    config.out.mkdir()
    (config.out / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists and is never overwritten"):
        train(config)
    assert [path.name for path in config.out.iterdir()] == ["mine"]


def test_unwritable_run_folder_is_refused(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make run folder .*/file is not a folder"):
        train(tiny_config(out=tmp_path / "file" / "run"))
    if Path("/proc/self").exists():
        with pytest.raises(UserError, match="cannot make run folder /proc/run"):
            train(tiny_config(out=Path("/proc/run")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "se_resnet8_cifra"}, "did you mean 'se_resnet8_cifar'"),
        ({"model_options": {"reductoin": 4}}, "has no option 'reductoin'"),
        ({"data": "no-such-folder"}, "no-such-folder"),
        ({"model": "resnet18", "model_options": {}}, "takes images of at least 32×32 pixels"),
        ({"recipe_batch_size": 49}, "batch_size 49"),
        ({"recipe_mixed_precision": "fp16"}, "'fp16' needs a CUDA GPU"),
    ],
)
def test_bad_input_is_refused_before_the_folder_is_made(
    tiny_config: Make, changes: dict[str, Any], message: str
) -> None:
    config = tiny_config(**changes)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not config.out.exists()
    assert not list(config.out.parent.glob(".run*"))


def test_missing_device_is_refused() -> None:
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(UserError, match=f"device '{missing}' is not available here"):
        choose_device(missing)
    with pytest.raises(UserError, match="device must be one of auto"):
        choose_device("tpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 2**32}, "seed must be below"),
        ({"num_workers": 1.5}, "num_workers must be a whole number"),
        ({"sync_bn": "no"}, "sync_bn must be true or false, got 'no'"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, mps, got 'gpu'"),
    ],
)
def test_config_refuses(tiny_config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


def test_config_file_round_trip(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(val_fraction=0.25, model_options={"stages": [2, 3], "gate": "tanh"})
    config.to_toml(tmp_path / "config.toml")
    assert RunConfig.from_toml(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "is not a TOML file"),
        ("modell = 'x'\n", "unknown option 'modell' of a run; did you mean 'model'?"),
        ("model = 'x'\n", "a run needs data and recipe and out"),
        (
            "model='x'\ndata='x'\nout='x'\n[recipe]\nepochs=1\n",
            "the recipe lacks batch_size, lr, schedule",
        ),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        RunConfig.from_toml(path)
    assert message in str(error.value)


def test_unreadable_images_are_counted(tiny_config: Make, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
            for index in range(8):
                image = Image.open(tiny_data / "train" / name / f"{index}.png")
                image.save(folder / split / name / f"{index}.png")
    (folder / "train" / "ant" / "bad.png").write_bytes(b"\x89PNG")
    seen = Recorder()
    train(tiny_config(data=str(folder), skip_bad_images=True), progress=seen)
    assert "images that cannot be read and are left out: 1" in seen.notes


DISTRIBUTED = """
import sys
from pathlib import Path
import torch
from senet.training.config import RunConfig
from senet.training.loop import train
result = train(RunConfig.from_toml(sys.argv[1]))
rank = torch.distributed.get_rank()
Path(sys.argv[2], f"rank{rank}").write_text(repr((result.evaluation.n, result.history)))
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_together(tiny_config: Make, tmp_path: Path) -> None:
    """gloo on the CPU: each validation image counts once, both see the same numbers."""
    script, config = tmp_path / "script.py", tiny_config()
    script.write_text(DISTRIBUTED)
    config.to_toml(tmp_path / "config.toml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", str(script), str(tmp_path / "config.toml"), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("(12, ")
    assert open_checkpoint(config.out).metrics["step"] in (6, 12)
