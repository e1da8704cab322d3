"""What a training step reads from the device, which makes the CPU wait for a GPU.

Counted on the CPU: each read goes through one of these operations, whatever asks for it (`item`,
`float`, `bool`, an index of a mask, a print), and each copy between the two through one of these
calls.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from senet.errors import SenetError
from senet.support.progress import Progress
from senet.tasks.classification import Classification
from senet.tasks.multilabel import MultiLabel
from senet.tasks.regression import Regression
from senet.training.config import RunConfig
from senet.training.loop import train
from senet.training.optimizer import Average
from senet.training.session import Session

Make = Callable[..., RunConfig]
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "equal",
}
COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor, Tensor.cpu)
LISTS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


class Reads(TorchDispatchMode):
    """Counts reads of tensors other than those that stay on the CPU whatever the device is."""

    def __init__(self, on_cpu: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.on_cpu = {tensor.data_ptr() for tensor in on_cpu}
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if (name in READS or masked) and args[0].data_ptr() not in self.on_cpu:
            self.found[name] += 1
        return func(*args, **kwargs or {})


class Calls(TorchFunctionMode):
    """Counts calls that copy between CPU and device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in COPIES or func in LISTS:
            self.found[func.__name__] += 1
        return func(*args, **kwargs or {})


def on_cpu(session: Session) -> list[Tensor]:
    """Counters of steps, which PyTorch's optimizers and our average keep on the CPU."""
    states = session.optimizer.optimizer.state.values()
    counters = [state["step"] for state in states if "step" in state]
    return counters + ([session.ema.n_averaged] if session.ema else [])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_reads_nothing_and_its_loss_is_one_read(tiny_config: Make, optimizer: str) -> None:
    """With clipped gradients, an average of the weights, class weights, mixing and metrics."""
    options: dict[str, Any] = {"recipe_optimizer": optimizer, "recipe_ema_decay": 0.9}
    if optimizer == "adamw":
        options["recipe_nesterov"] = False
    options |= {"recipe_grad_clip": 1.0, "recipe_class_weights": "balanced", "accumulate": 2}
    session = Session(tiny_config(**options))
    assert session.ema is not None
    session.model.train()
    batches = session.batches(0)
    before = session.train_step(*next(batches), 1)  # makes the state of optimizer and metrics
    for number in (2, 3):
        images, targets = next(batches)
        with Reads(on_cpu(session)) as reads, Calls() as calls:
            begun = session.train_step(images, targets, number)
        assert not reads.found, reads.found
        assert not calls.found, calls.found
        with Reads() as reads, Calls() as calls:
            loss, stop = session.finished(before)
        assert calls.found == {"tolist": 1}
        assert loss > 0
        assert not stop
        before = begun
    session.finished(before)


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Classification(("a", "b"), weights=(1.0, 2.0)), torch.tensor([0, 1, 1])),
        (MultiLabel(("a", "b"), weights=(1.0, 2.0)), torch.ones(3, 2)),
        (Regression(("a", "b"), (1.0, 2.0), (3.0, 4.0)), torch.ones(3, 2)),
    ],
)
def test_losses_copy_nothing_to_the_device_twice(task: Any, targets: Tensor) -> None:
    outputs = torch.zeros(3, 2, requires_grad=True)
    with torch.inference_mode():
        task.loss(outputs, targets)
    with Reads() as reads, Calls() as calls:
        task.loss(outputs, targets).mean().backward()
    assert not reads.found
    assert not calls.found


def test_an_average_reads_nothing_from_the_device() -> None:
    """The device "meta" has nothing that could be read."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to("meta")
    average = Average(network, 0.9)
    for _ in range(3):
        average.update_parameters(network)
    assert average.n_averaged == 3
    assert average.n_averaged.device.type == "cpu"


class Heard(Progress):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, images: int, loss: float, lr: float) -> None:
        self.losses.append(loss)


@pytest.mark.parametrize("every", [0, 1, 3])
def test_a_loss_that_is_not_finite_stops_before_weights_are_saved(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Step 8's loss is infinite while its weights stay finite: no check of weights would see it."""
    real, steps, heard = Classification.loss, [0], Heard()

    def loss(self: Classification, outputs: Tensor, targets: Tensor) -> Tensor:
        found = real(self, outputs, targets)
        if not outputs.requires_grad:
            return found
        steps[0] += 1
        return found + (torch.inf if steps[0] == 8 else 0)

    monkeypatch.setattr(Classification, "loss", loss)
    config = tiny_config(checkpoint_steps=every)
    with pytest.raises(SenetError, match=r"loss is inf at step 8 \(epoch 2, lr"):
        train(config, progress=heard)
    assert len(heard.losses) == 7
    assert steps[0] == (8 if every == 1 else 9)  # the step after has begun, unless 8 is to be saved
    state = config.out / "checkpoints" / "last" / "training_state.pt"
    saved = torch.load(state, weights_only=True)["position"]["step"]
    assert saved == {0: 6, 1: 7, 3: 6}[every]
