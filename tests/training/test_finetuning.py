"""Optimizers by name, learning rates by layer, early stopping, what is new, stochastic depth."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.marks import separate_passes
from torch import nn

import senet
from senet.checkpoint.write import write_checkpoint
from senet.data import Preprocessing, load_data
from senet.errors import UserError
from senet.models import build_model
from senet.models.description import describe
from senet.support.progress import Progress
from senet.training.config import RunConfig
from senet.training.drop_path import drop_branches
from senet.training.layers import layers_of
from senet.training.loop import resume, train
from senet.training.optimizer import build_optimizer, build_schedule
from senet.training.recipe import Recipe, fitting_batch, get_recipe, scaled_lr
from senet.training.session import Session
from senet.training.task import balanced_weights

Make = Callable[..., RunConfig]


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"epochs": 10, "batch_size": 64, "lr": 0.01, "schedule": "constant"}
    return Recipe(**(values | changes))


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", "SGD", {"momentum": 0.8}),
        ("adamw", "AdamW", {"betas": (0.8, 0.999)}),
        ("radam", "RAdam", {"betas": (0.8, 0.999)}),
        ("rmsprop", "RMSprop", {"momentum": 0.8}),
        ("lamb", "Lamb", {"betas": (0.8, 0.999)}),
        ("lion", "Lion", {"betas": (0.8, 0.99)}),
    ],
)
def test_optimizers_by_name(name: str, kind: str, options: Mapping[str, Any]) -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, recipe(optimizer=name, momentum=0.8, weight_decay=0.1))
    assert type(optimizer).__name__ == kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    assert {key: group[key] for key in options} == options
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adamv"}, "did you mean 'adam"),
        ({"optimizer": "lamv"}, "did you mean 'lam"),
        ({"optimizer": "adafactor"}, "does not take a learning rate, a momentum"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov is of sgd"),
        ({"beta2": 0.9}, "beta2 is of Adam's family"),
        ({"patience": 0}, "patience must be"),
        ({"layer_decay": 1.5}, "layer_decay must be"),
        ({"drop_path": 1.0}, "drop_path must be"),
        ({"class_weights": "even"}, "class_weights must be one of none, balanced"),
    ],
)
def test_what_recipes_refuse(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(**changes)


def test_another_kind_of_optimizer_needs_its_own_rate() -> None:
    with pytest.raises(UserError, match="adamw needs a learning rate of its own"):
        get_recipe("cifar", optimizer="adamw")
    changed = get_recipe("cifar", optimizer="adamw", lr=1e-3)
    assert not changed.nesterov
    assert get_recipe("finetune", optimizer="lamb").lr == get_recipe("finetune").lr


def test_fields_of_the_augmentation_are_given_alike() -> None:
    changed = get_recipe("quick", crop="random_resized", mixup=0.2)
    images = changed.augmentation
    assert (images.crop, images.padding, images.mixup, images.flip) == (
        "random_resized", 0, 0.2, True,
    )  # fmt: skip
    assert get_recipe("finetune", crop="padded").augmentation.padding == 4
    with pytest.raises(UserError, match="mixup must be between"):
        get_recipe("quick", mixup=-1)


def rates(recipe: Recipe, steps: int) -> list[float]:
    optimizer = build_optimizer(nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe, steps)
    seen = []
    for _ in range(recipe.epochs * steps):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def test_linear_and_exponential_schedules() -> None:
    falling = rates(recipe(schedule="linear", warmup_epochs=2), 1)
    assert falling[2:] == pytest.approx([0.01 * (8 - k) / 8 for k in range(8)])
    by_epoch = rates(recipe(schedule="exponential", step_gamma=0.5), 2)[::2]
    assert by_epoch == pytest.approx([0.01 * 0.5**k for k in range(10)])


def test_layers_go_from_the_images_to_the_head() -> None:
    model = build_model("se_resnet8_cifar", num_classes=3)
    layers = layers_of(model)
    assert [names[0].rpartition(".")[0].split(".")[0] for names in layers] == [
        "conv1", "layer1", "layer2", "layer3", "fc",
    ]  # fmt: skip
    assert {"bn1.weight", "bn1.bias"} <= set(layers[0])
    assert sum(map(len, layers)) == len(list(model.parameters()))
    groups = build_optimizer(model, recipe(layer_decay=0.5), {"fc.weight", "fc.bias"}).param_groups
    lrs = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert lrs[id(model.conv1.weight)] == pytest.approx(0.01 / 16)
    assert lrs[id(model.bn1.bias)] == pytest.approx(0.01 / 16)
    assert lrs[id(model.layer3[0].conv1.weight)] == pytest.approx(0.005)
    assert lrs[id(model.fc.weight)] == pytest.approx(0.01)


def test_new_layers_learn_faster(tiny_config: Make, tmp_path: Path) -> None:
    model = senet.create_model("resnet8_cifar", num_classes=7)
    senet.insert(model, example_input=torch.zeros(2, 3, 8, 8))
    images = Preprocessing(8, None, (0.5,) * 3, (0.2,) * 3)
    write_checkpoint(
        tmp_path / "start", model.state_dict(), describe(model.config, images.to_dict(), None)
    )
    changes: dict[str, Any] = {"model": "se_resnet8_cifar", "model_options": {}}
    changes |= {"init": str(tmp_path / "start"), "recipe_new_layer_lr": 10.0}
    config = tiny_config(**changes | {"model": model.config["name"]})
    session = Session(config)
    new = {name for name, _ in session.model.named_parameters() if ".se." in name or "fc." in name}
    assert session.material.new >= {"fc.weight", "fc.bias"}
    assert any(".se." in name for name in session.material.new)
    assert {name for name in session.material.new if not name.startswith("fc")} <= new
    lrs = {group["lr"] for group in session.optimizer.param_groups}
    assert len(lrs) == 2
    assert max(lrs) == pytest.approx(10 * min(lrs))
    assert session.lr == min(lrs)  # what is told is the recipe's own


def test_a_run_has_trained_its_blocks(tiny_config: Make, tmp_path: Path) -> None:
    first = train(tiny_config(recipe_epochs=1, recipe_warmup_epochs=0))
    again = tiny_config(init=str(first.run), model_options={}, out=tmp_path / "again")
    assert not Session(again).material.new


@pytest.mark.parametrize(
    ("images", "multiple", "expected"),
    [(512, 1, 64), (10_000, 1, 64), (511, 1, 32), (100, 1, 8), (24, 1, 8), (5, 1, 4), (100, 3, 6)],
)
def test_batches_fit_the_data(images: int, multiple: int, expected: int) -> None:
    assert fitting_batch(recipe(), images, multiple) == expected


def test_rates_of_other_batches() -> None:
    assert scaled_lr(recipe(), 16) == pytest.approx(0.01 / 4)
    assert scaled_lr(recipe(optimizer="adamw"), 16) == pytest.approx(0.01 / 2)


class Notes(Progress):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, message: str) -> None:
        self.heard.append(message)


def test_patience_ends_a_run_and_stays_ended(tiny_config: Make) -> None:
    config = tiny_config(
        recipe_epochs=30, recipe_patience=2, recipe_warmup_epochs=0, recipe_lr=1e-8
    )
    heard = Notes()
    result = train(config, progress=heard)
    assert len(result.history) == result.best_epoch + 2 < 30
    assert any("were no better than epoch" in note for note in heard.heard)
    assert resume(config.out).history == result.history


def test_balanced_weights() -> None:
    targets = torch.tensor([0, 0, 0, 2])
    weights = balanced_weights(targets, 3)
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 0, 4 / 2])
    assert float(weights[targets].mean()) == pytest.approx(1)


def test_balanced_weights_reach_the_loss(tiny_config: Make) -> None:
    session = Session(tiny_config(recipe_class_weights="balanced"))
    weights = session.task.weights  # type: ignore[attr-defined]
    assert weights == (1, 1, 1)  # the classes are as many
    logits = torch.randn(2, 3)
    object.__setattr__(session.task, "weights", (1.0, 5.0, 0.0))
    plain = nn.functional.cross_entropy(logits, torch.tensor([1, 2]), reduction="none")
    expected = plain * torch.tensor([5.0, 0.0])
    torch.testing.assert_close(session.task.loss(logits, torch.tensor([1, 2])), expected)


@separate_passes
@pytest.mark.parametrize("name", ["se_resnet8_cifar", "resnet8_cifar"])
def test_branches_are_dropped_in_training_alone(name: str) -> None:
    model = build_model(name, num_classes=3)
    example = torch.randn(4, 3, 16, 16)
    plain = model.eval()(example)
    names = drop_branches(model, 0.75, example[:1])
    assert len(names) == 3
    torch.testing.assert_close(model(example), plain)
    model.train()
    seen: list[torch.Tensor] = []
    model.get_submodule(names[-1]).register_forward_hook(lambda m, a, out: seen.append(out))
    for _ in range(10):
        model(example)
    kept = torch.cat(seen).flatten(1).abs().sum(1) > 0
    assert 2 <= int(kept.sum()) <= 20  # of 40, of which a quarter is expected
    with pytest.raises(UserError, match="has none that ends in a module"):
        drop_branches(nn.Sequential(nn.Conv2d(3, 3, 1)), 0.5, example)


@separate_passes
def test_a_run_with_all_of_it_resumes_exactly(tiny_config: Make, tmp_path: Path) -> None:
    from senet.training.loop import Interrupted

    changes = {
        "recipe_optimizer": "adamw", "recipe_nesterov": False, "recipe_lr": 1e-3,
        "recipe_drop_path": 0.3, "recipe_layer_decay": 0.8, "recipe_class_weights": "balanced",
    }  # fmt: skip

    class Stop(Progress):
        steps = 0

        def step(self, images: int, loss: float, lr: float) -> None:
            import signal

            self.steps += 1
            if self.steps == 8:
                signal.raise_signal(signal.SIGTERM)

    whole = train(tiny_config(**changes))
    parts = tiny_config(**changes, out=tmp_path / "parts")
    with pytest.raises(Interrupted):
        train(parts, progress=Stop())
    resume(parts.out)
    for file in ("metrics.csv", "checkpoints/last/model.safetensors"):
        assert (parts.out / file).read_bytes() == (whole.run / file).read_bytes()


def test_start_from_the_hub(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = senet.create_model("se_resnet8_cifar", num_classes=3)
    model.preprocessing = Preprocessing(8, None, (0.5,) * 3, (0.2,) * 3).to_dict()
    model.save_pretrained(tmp_path / "published")

    def local(path: object) -> Path:
        assert str(path) == "hf_hub:someone/something"
        return tmp_path / "published" / "model.safetensors"

    monkeypatch.setattr("senet.checkpoint.files.local_file", local)
    config = tiny_config(init="hf_hub:someone/something", model_options={}, recipe_epochs=1)
    session = Session(config)
    assert torch.equal(session.model.conv1.weight.cpu(), model.conv1.weight)


def test_the_images_choose_the_network(tiny_config: Make, tiny_data: Path) -> None:
    assert load_data(str(tiny_data)).preprocessing.image_size == 8
    session = Session(tiny_config(model="auto", model_options={}))
    assert session.config.model == "se_resnet20_cifar"
    with pytest.raises(UserError, match="give model"):
        tiny_config(model="auto", model_options={}, init="somewhere")
