"""SE blocks and networks of this package in the loops of Lightning and accelerate."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import senet


def batches() -> DataLoader[Any]:
    labels = torch.arange(16) % 2
    images = torch.randn(16, 3, 8, 8) + labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def test_accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = senet.create_model("se_resnet8_cifar", num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for images, labels in loader:
        accelerator.backward(nn.functional.cross_entropy(wrapped(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    for name in ("conv1.weight", "layer1.0.se.fc2.bias", "layer3.0.bn2.weight", "fc.weight"):
        assert not torch.equal(model.get_parameter(name), before[name]), name
    AcceleratorState._reset_state(reset_partial_state=True)


def test_lightning(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = senet.create_model("se_resnet8_cifar", num_classes=2)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            images, labels = batch
            return nn.functional.cross_entropy(self.network(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Classifier()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's remarks on workers and loggers
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, batches())
        trainer.save_checkpoint(tmp_path / "module.ckpt")
        again = Classifier.load_from_checkpoint(tmp_path / "module.ckpt")
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])
