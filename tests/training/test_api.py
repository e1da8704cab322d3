"""`fit`: any module, data set or loader and loss, resumed exactly."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

import senet
from senet.checkpoint.files import open_checkpoint
from senet.data import load_data
from senet.errors import UserError
from senet.support.progress import Progress
from senet.training import Interrupted, fit, get_recipe, restore

RECIPE = get_recipe("finetune", epochs=2, batch_size=8, lr=0.01, mixup=0.2)


class Noisy(Dataset[Any]):
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(3, 8, 8) + random.random() + float(np.random.rand())  # noqa: NPY002
        return noise + index % 2, index % 2


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), senet.SqueezeExcitation(8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(8, 2),
    )  # fmt: skip


class Stop(Progress):
    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, images: int, loss: float, lr: float) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)


def loader(shuffle: bool = True, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=8, shuffle=shuffle, num_workers=workers, drop_last=True)


@pytest.mark.parametrize("kind", ["items", "loader", "workers", "generator"])
def test_a_stopped_fit_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    def data() -> tuple[Any, Any]:
        val = TensorDataset(torch.randn(9, 3, 8, 8), torch.arange(9) % 2)
        torch.manual_seed(0)
        if kind == "items":
            return Noisy(), val
        if kind == "generator":
            own = torch.Generator().manual_seed(5)
            return DataLoader(Noisy(), batch_size=8, shuffle=True, generator=own), val
        return loader(workers=2 if kind == "workers" else 0), DataLoader(val, batch_size=4)

    settings: dict[str, Any] = {"recipe": RECIPE, "device": "cpu"}
    torch.manual_seed(1)
    whole = fit(network(), *data(), out=tmp_path / "whole", **settings)
    out = tmp_path / "parts"
    torch.manual_seed(2)
    with pytest.raises(Interrupted):
        fit(network(), *data(), out=out, callbacks=[Stop(6)], **settings)
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(4)  # noqa: NPY002
    workers = {"num_workers": 1} if kind == "items" else {}  # which change nothing
    for _ in range(2):  # the second time it has ended
        ended = fit(network(), *data(), out=out, resume=True, **settings, **workers)
    for file in ("metrics.csv", "checkpoints/last/model.safetensors"):
        assert (out / file).read_bytes() == (whole.run / file).read_bytes()
    assert ended.history == whole.history


def test_weights_come_back(tmp_path: Path) -> None:
    model = network()
    val = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)
    result = fit(model, Noisy(), val, recipe=RECIPE, out=tmp_path / "run", device="cpu")
    fresh = network()
    restore(fresh, result.run, slot="last")
    found = fresh.eval()(val[:][0])
    accuracy = 100 * float((found.argmax(1) == val[:][1]).float().mean())
    assert accuracy == pytest.approx(result.history[-1]["top1"])
    with pytest.raises(UserError, match="do not fit"):
        restore(nn.Linear(2, 2), result.run)
    with pytest.raises(UserError, match="no weights at"):
        restore(fresh, tmp_path)
    with pytest.raises(UserError, match="only your code makes"):
        open_checkpoint(result.run)


def test_any_loss_and_metrics(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            y = self.layer(x["values"])
            return y[:, 0], y[:, 1:]

    class Pairs(Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            return {"values": torch.full((4,), index / 16)}, torch.tensor([index / 16, 1.0, 2.0])

    def loss(outputs: list[Tensor], targets: Tensor) -> Tensor:
        first, rest = outputs
        return (first - targets[:, 0]).abs() + (rest - targets[:, 1:]).square().sum(1)

    class FirstError(MeanAbsoluteError):
        def update(self, outputs: list[Tensor], targets: Tensor) -> None:
            super().update(outputs[0], targets[:, 0])

    recipe = get_recipe("finetune", epochs=3, batch_size=8, lr=0.05, label_smoothing=0)
    result = fit(
        Two(), Pairs(), Pairs(), recipe=recipe, loss=loss, metrics={"mae": FirstError()},
        out=tmp_path / "run", device="cpu", accumulate=2,
    )  # fmt: skip
    assert set(result.best) == {"epoch", "step", "lr", "train_loss", "val_loss", "mae"}
    assert result.judged == "mae"
    assert result.best["mae"] == min(row["mae"] for row in result.history)  # lower is better


def test_metrics_of_classes(tmp_path: Path) -> None:
    val = TensorDataset(torch.randn(6, 3, 8, 8), torch.arange(6) % 2)
    result = fit(
        network(), Noisy(), val, recipe=RECIPE, out=tmp_path / "run", device="cpu",
        metrics={"accuracy": MulticlassAccuracy(2, average="micro")},
        transforms=(None, torch.zeros_like),
    )  # fmt: skip
    assert result.history[-1]["accuracy"] == pytest.approx(0.5)  # all images are alike
    assert result.best["accuracy"] == max(row["accuracy"] for row in result.history)


def test_data_and_networks_by_name_stay_whole(tiny_data: Path, tmp_path: Path) -> None:
    model = senet.create_model("se_resnet8_cifar", num_classes=3)
    recipe = get_recipe("quick", epochs=1, batch_size=8, warmup_epochs=0.5)
    result = fit(
        model, load_data(str(tiny_data)), recipe=recipe, out=tmp_path / "run", device="cpu"
    )
    opened = open_checkpoint(result.run)
    assert opened.classes == ("ant", "bee", "cow")
    assert opened.preprocessing.image_size == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val": None}, "give val"),
        ({"sed": 1}, "fit has no option 'sed'"),
        ({"train": iter([])}, "has no length"),
        ({"recipe": "finetun"}, "did you mean 'finetune'"),
        ({"judged": "mae"}, "needs metrics"),
        ({"metrics": {"lr": MeanAbsoluteError()}}, "is a column of metrics.csv"),
        ({"loss": nn.MSELoss(), "judged": "r2"}, "judged must be one of val_loss"),
        ({"model": nn.Flatten(0)}, "needs logits"),
        ({"recipe": get_recipe("quick", class_weights="balanced", batch_size=8)}, "class_weights"),
    ],
)
def test_what_fit_refuses(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    val = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)
    given: dict[str, Any] = {"model": network(), "train": Noisy(), "val": val, "recipe": RECIPE}
    with pytest.raises(UserError, match=words):
        fit(**{**given, **changes}, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_options_is_refused(tmp_path: Path) -> None:
    val = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)
    out = tmp_path / "run"
    fit(network(), Noisy(), val, recipe=RECIPE, out=out, device="cpu")
    with pytest.raises(UserError, match=r"other options \(seed\)"):
        fit(network(), Noisy(), val, recipe=RECIPE, out=out, device="cpu", seed=1, resume=True)
    with pytest.raises(UserError, match="exists"):
        fit(network(), Noisy(), val, recipe=RECIPE, out=out, device="cpu")
