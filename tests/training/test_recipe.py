"""Recipes: their numbers, what they refuse, and the schedules they give."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from senet.data import Augmentation
from senet.errors import UserError
from senet.models import build_model
from senet.training.optimizer import Average, build_optimizer, build_schedule
from senet.training.recipe import RECIPES, Recipe, get_recipe


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"epochs": 10, "batch_size": 8, "lr": 0.1, "schedule": "constant"}
    return Recipe(**(values | changes))


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """The learning rate of each step."""
    optimizer = build_optimizer(nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe, steps_per_epoch)
    seen = []
    for _ in range(recipe.epochs * steps_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(seen) < recipe.epochs * steps_per_epoch:
            schedule.step()
    return seen


def test_imagenet_paper_is_the_papers() -> None:
    """Paper, section 5."""
    paper = RECIPES["imagenet-paper"]
    assert (paper.batch_size, paper.lr, paper.momentum, paper.epochs) == (1024, 0.6, 0.9, 100)
    assert not paper.nesterov
    assert paper.normalisation == "mean"
    crop = paper.augmentation
    assert (crop.crop, crop.flip, crop.scale) == ("random_resized", True, (0.08, 1.0))
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3))
    by_epoch = rates(paper, 2)[::2]
    expected = [0.6] * 30 + [0.06] * 30 + [0.006] * 30 + [0.0006] * 10
    assert by_epoch == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["se_resnet50", "se_resnet20_cifar"])
def test_networks_start_from_he_initialisation(name: str) -> None:
    """Weights of convolutions have variance 2 / fan (arXiv 1502.01852), fan of either side."""
    model = build_model(name, num_classes=10)
    tested = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None and module.weight.numel() > 9000:
            area = math.prod(module.kernel_size)
            fans = [module.in_channels * area, module.out_channels * area]
            spread = float(module.weight.detach().std())
            assert any(spread == pytest.approx(math.sqrt(2 / fan), rel=0.05) for fan in fans)
            tested += 1
    assert tested > 5


def test_cifar_is_that_of_wide_resnets() -> None:
    cifar = RECIPES["cifar"]
    assert (cifar.epochs, cifar.batch_size, cifar.nesterov) == (200, 128, True)
    assert cifar.weight_decay == 5e-4
    by_epoch = rates(cifar, 1)
    expected = [0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40
    assert by_epoch == pytest.approx(expected, rel=1e-12)


def test_quick_rises_to_its_peak_and_falls() -> None:
    seen = rates(RECIPES["quick"], 78)
    peak = seen.index(max(seen))
    assert max(seen) == pytest.approx(0.2)
    assert peak == 2 * 78 - 1
    assert seen[: peak + 1] == sorted(seen[: peak + 1])
    assert seen[peak:] == sorted(seen[peak:], reverse=True)
    assert seen[-1] < 1e-5


def test_cosine_with_warmup() -> None:
    seen = rates(recipe(schedule="cosine", warmup_epochs=2), 5)
    assert seen[0] == pytest.approx(0.001)
    assert seen[5] == pytest.approx(0.001 + 0.099 / 2)
    for step in range(10, 50):  # half a cosine over the 40 steps after the warm-up
        assert seen[step] == pytest.approx(0.05 * (1 + math.cos(math.pi * (step - 10) / 40)))


def test_steps_count_from_the_start_in_spite_of_a_warmup() -> None:
    seen = rates(recipe(schedule="step", step_epochs=(4, 8), warmup_epochs=1), 5)
    assert [step for step in range(6, 50) if seen[step] < seen[step - 1]] == [20, 40]
    assert seen[-1] == pytest.approx(0.001)


def test_constant() -> None:
    assert rates(recipe(), 3) == [0.1] * 30


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_cycle_of_very_few_steps(steps: int) -> None:
    short = recipe(epochs=1, schedule="one_cycle", warmup_epochs=0.5)
    assert all(0 < lr <= 0.1 + 1e-12 for lr in rates(short, steps))


def test_epochs_scale_warmup_and_steps() -> None:
    assert get_recipe("cifar", epochs=20).step_epochs == pytest.approx((6, 12, 16))
    assert get_recipe("quick", epochs=4).warmup_epochs == 1
    assert get_recipe("imagenet-modern", epochs=40).warmup_epochs == 1
    assert get_recipe("imagenet-modern", epochs=40, warmup_epochs=5).warmup_epochs == 5
    assert get_recipe("cifar", schedule="cosine").step_epochs == ()


def test_augmentation_overrides_by_field() -> None:
    changed = get_recipe("cifar", augmentation={"mixup": 0.2})
    assert changed.augmentation == Augmentation(crop="padded", padding=4, flip=True, mixup=0.2)


@pytest.mark.parametrize("name", RECIPES)
def test_dict_round_trip(name: str) -> None:
    named = get_recipe(name)
    assert named.name == name
    assert Recipe.from_dict(named.to_dict()) == named


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, r"epochs must be a whole number of at least 1, got 1\.5"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"batch_size": -1}, "batch_size must be a whole number of at least 1, got -1"),
        ({"lr": 0}, "lr must be a number above 0, got 0; 0.1 suits"),
        ({"lr": math.nan}, "lr must be a number above 0, got nan"),
        ({"lr": math.inf}, "lr must be a number above 0, got inf"),
        ({"lr": "0.1"}, "lr must be a number above 0, got '0.1'"),
        ({"momentum": 1.0}, r"momentum must be a number at least 0 and below 1, got 1\.0"),
        ({"weight_decay": -1e-4}, "weight_decay must be a number at least 0, got -0.0001"),
        ({"label_smoothing": 1.0}, "label_smoothing must be a number at least 0 and below 1"),
        ({"ema_decay": 1.0}, "ema_decay must be a number above 0 and below 1"),
        ({"grad_clip": 0.0}, "grad_clip must be a number above 0, got 0.0; leave it out"),
        ({"step_gamma": 2}, "step_gamma must be a number above 0 and at most 1, got 2"),
        (
            {"schedule": "cosin"},
            "schedule must be one of step, cosine, one_cycle, linear",
        ),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16"),
        ({"normalisation": "std"}, "normalisation must be one of mean_std, mean"),
        ({"warmup_epochs": 10}, r"warmup_epochs must be less than epochs \(10\), got 10"),
        ({"schedule": "one_cycle"}, "warmup_epochs must be above 0 for one_cycle"),
        ({"schedule": "step"}, "step_epochs must rise strictly"),
        ({"schedule": "step", "step_epochs": (5, 3)}, "step_epochs must rise strictly"),
        ({"schedule": "step", "step_epochs": (5, 10)}, "step_epochs must rise strictly"),
        ({"step_epochs": (5,)}, "step_epochs belongs to the step schedule"),
        ({"momentum": 0, "nesterov": True}, "nesterov needs momentum above 0"),
        ({"nesterov": "no"}, "nesterov must be true or false, got 'no'"),
        ({"decay_norm_and_bias": 0}, "decay_norm_and_bias must be true or false, got 0"),
        ({"step_epochs": 5}, "step_epochs must be a list of numbers, got 5"),
        ({"step_epochs": "12"}, "step_epochs must be a list of numbers, got '12'"),
        ({"step_epochs": ["a"]}, "step_epochs must be a list of numbers, got .'a'."),
        ({"name": 5}, "name must be text in quotes, got 5"),
        ({"augmentation": 5}, "augmentation must be a table of Augmentation, got 5"),
        ({"optimizer": 5}, "optimizer must be text in quotes, got 5"),
        ({"optimizer": "adahessian"}, "optimizer adahessian needs second derivatives"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cifra", {}, "unknown recipe 'cifra'; did you mean 'cifar'?"),
        ("zzz", {}, "unknown recipe 'zzz'; choose from quick, cifar"),
        ("cifar", {"epoch": 3}, "unknown recipe field 'epoch'; did you mean 'epochs'?"),
        ("cifar", {"augmentation": {"flop": 1}}, "unknown augmentation field 'flop'; did you"),
        ("cifar", {"augmentation": 5}, "augmentation must be a table such as {flip = true}, got 5"),
        ("cifar", {"flip": "no"}, "flip must be true or false, not 'no'"),
        ("cifar", {"padding": "2"}, "padding must be a whole number, not '2'"),
        ("cifar", {"mixup": "a"}, "mixup must be a number, not 'a'"),
        ("cifar", {"scale": 3}, "scale must be two numbers, not 3"),
        ("cifar", {"randaugment": ["a", "b"]}, "randaugment must be two whole numbers, or left"),
        ("cifar", {"randaugment": (2, 9, 1)}, "randaugment must be two whole numbers, or left"),
        ("cifar", {"optimizer": 5, "lr": 0.1}, "optimizer must be a name such as sgd, got 5"),
        (5, {}, "name must be that of a recipe, got 5"),
    ],
)
def test_get_recipe_refuses(name: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        get_recipe(name, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize("everything", [True, False])
def test_weight_decay_on_norm_and_bias(everything: bool) -> None:
    model = build_model("se_resnet8_cifar", num_classes=10)
    groups = build_optimizer(
        model, recipe(weight_decay=0.5, decay_norm_and_bias=everything)
    ).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = isinstance(module, nn.BatchNorm2d) or name == "bias"
            assert (id(parameter) in decayed) == (everything or not exempt)


def test_moving_average_is_the_recursion() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, 0.5)
    expected = None
    for n in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 2))  # moves BN's statistics
        average.update_parameters(model)
        now = torch.cat([model[0].weight.detach().flatten(), model[1].running_var])
        decay = min(0.5, (1 + n) / (10 + n))
        expected = now.clone() if expected is None else decay * expected + (1 - decay) * now
    mine = torch.cat([average.module[0].weight.detach().flatten(), average.module[1].running_var])
    torch.testing.assert_close(mine, expected)
    assert int(average.module[1].num_batches_tracked) == 12
