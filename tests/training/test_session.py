"""A step of the training, number by number: the rates, and the moving average's recursion."""

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from senet.errors import UserError
from senet.training.config import RunConfig
from senet.training.session import Position, Session

Make = Callable[..., RunConfig]

# Of 2 epochs with 6 steps each, and half an epoch of warm-up.
WARMUP, STEPS, LR = 3, 12, 0.05
RISE = [LR * (0.01 + 0.99 * step / WARMUP) for step in range(WARMUP)]
RATES = {
    "cosine": [
        *RISE,
        *(
            LR * (1 + math.cos(math.pi * step / (STEPS - WARMUP))) / 2
            for step in range(STEPS - WARMUP)
        ),
    ],
    "step": [*RISE, *([LR] * 4), *([LR / 10] * 3), *([LR / 100] * 2)],
    "constant": [*RISE, *([LR] * 9)],
    # From LR/25 up to LR in 3 steps and down to LR/250,000, both along half a cosine.
    "one_cycle": [
        *(LR / 25 + (LR - LR / 25) * (1 - math.cos(math.pi * step / 2)) / 2 for step in range(3)),
        *(
            LR / 25e4 + (LR - LR / 25e4) * (1 + math.cos(math.pi * step / 9)) / 2
            for step in range(1, 10)
        ),
    ],
}


def run(session: Session) -> list[float]:
    """Both epochs; the rates of their steps."""
    rates = []
    for epoch in range(2):
        for images, targets in session.batches(epoch):
            rates.append(session.lr)
            applied = session.optimizer.param_groups[0]["lr"]
            assert applied == session.lr
            session.train_step(images, targets, len(rates))
    return rates


@pytest.mark.parametrize("schedule", RATES)
def test_each_step_has_its_rate(tiny_config: Make, schedule: str) -> None:
    epochs = {"recipe_step_epochs": (7 / 6, 10 / 6)} if schedule == "step" else {}
    session = Session(tiny_config(recipe_schedule=schedule, **epochs))
    assert (session.steps_per_epoch, session.total_steps) == (6, STEPS)
    assert run(session) == pytest.approx(RATES[schedule], rel=1e-6)


def test_the_average_follows_the_weights_after_each_step(tiny_config: Make) -> None:
    """θ̄ₙ = dₙ θ̄ₙ₋₁ + (1 - dₙ) θₙ with dₙ = min(0.9, (1 + n) / (10 + n)); θ̄₀ is the first θ."""
    session = Session(tiny_config())
    assert session.ema is not None
    model, average = session.model, session.ema.module
    names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    expected: dict[str, torch.Tensor] = {}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for n, (images, targets) in enumerate(session.batches(0)):
        session.train_step(images, targets, n + 1)
        now, found = model.state_dict(), average.state_dict()
        assert not torch.equal(now["fc.weight"], start["fc.weight"])
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        for name in names:
            before = expected.get(name, torch.zeros(()))
            expected[name] = decay * before + (1 - decay) * now[name].double()
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-7)
        assert found["bn1.num_batches_tracked"] == n + 1


@pytest.mark.parametrize("mixed", [True, False])
def test_loss_and_metrics_of_a_step(tiny_config: Make, mixed: bool) -> None:
    """Cross-entropy over images, as PyTorch's own; hits count the largest share of a mix."""
    changes: dict[str, Any] = {"recipe_label_smoothing": 0.1}
    if not mixed:
        changes["recipe_augmentation"] = type(tiny_config().recipe.augmentation)()
    session = Session(tiny_config(**changes))
    images, targets = next(session.batches(0))
    assert targets.ndim == (2 if mixed else 1)
    with torch.no_grad():
        logits = session.model.train()(images)
    wanted = F.cross_entropy(logits, targets, label_smoothing=0.1)
    classes = targets.argmax(1) if mixed else targets
    again = Session(tiny_config(**changes))
    images, targets = next(again.batches(0))
    loss, _ = again.finished(again.train_step(images, targets, 1))
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    assert float(again.meters["train_loss"].compute()) == pytest.approx(float(wanted), rel=1e-5)
    hits = (logits.argmax(1) == classes).float().mean()
    assert float(again.meters["train_top1"].compute()) == pytest.approx(float(hits))


def test_a_restored_session_goes_on_as_if_nothing_had_been(tiny_config: Make) -> None:
    """Within an epoch: the same batches, losses, rates, sums of the metrics and averages."""
    first, at = Session(tiny_config()), Position()
    batches = iter(first.batches(0))
    for _ in range(4):
        first.train_step(*next(batches), at.step + 1)
        at.step, at.done = at.step + 1, at.done + 1
    state = copy.deepcopy(first.state(at))

    def steps(session: Session, batches: Iterable[Any]) -> list[Any]:
        begun = (session.train_step(*batch, n) for n, batch in enumerate(batches, 5))
        return [(session.finished(step), session.lr) for step in begun]

    left = steps(first, batches)

    second = Session(tiny_config(seed=0))
    assert second.restore(state) == at
    batches = second.batches(0)
    second.restore_random(state)
    assert steps(second, batches) == left
    assert len(left) == 2
    for name, meter in first.meters.items():
        assert torch.equal(second.meters[name].compute(), meter.compute())
    for name, tensor in first.judged.state_dict().items():
        assert torch.equal(second.judged.state_dict()[name], tensor)


def test_other_data_than_before_are_refused(tiny_config: Make) -> None:
    session = Session(tiny_config())
    state = session.state(Position())
    state["data"] = {**state["data"], "train": 47}
    with pytest.raises(UserError, match=r"is not what it was when the run began: it had .*47"):
        session.restore(state)


def test_every_option_of_the_data_reaches_them(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "download": True,
        "val_fraction": 0.25,
        "image_size": 9,
        "skip_bad_images": True,
        "shuffle_buffer": 77,
        "bad_shards": "skip",
        "decode": "scaled",
        "epoch_size": 55,
        "channels": 1,
        "depth": "16",
        "image_column": "picture",
        "label_column": "kind",
        "label_separator": ";",
        "task": "multilabel",
    }
    seen: dict[str, Any] = {}

    def load(source: str, **given: Any) -> None:
        seen.update(given, source=source)
        raise UserError("enough")

    monkeypatch.setattr("senet.training.data.load_data", load)
    with pytest.raises(UserError, match="enough"):
        Session(tiny_config(data="somewhere", data_root="elsewhere", **options))
    places = {"source": seen.pop("source"), "root": seen.pop("root")}
    assert [Path(place).name for place in places.values()] == ["somewhere", "elsewhere"]
    assert seen == {**options, "colours": False}
