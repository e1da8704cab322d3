"""Counted parameters and multiply-adds, by hand."""

import pytest
from torch import nn

from senet.models.cost import count_multiply_adds, count_parameters, meta_model


def test_parameters_are_counted_once_and_buffers_not() -> None:
    shared = nn.Linear(3, 2)
    model = nn.Sequential(shared, nn.BatchNorm1d(2), nn.Linear(2, 3), shared)
    assert count_parameters(model) == (3 * 2 + 2) + 2 * 2 + (2 * 3 + 3)


def test_frozen_parameters_can_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    model[0].weight.requires_grad_(False)
    assert count_parameters(model) == 8 + 15
    assert count_parameters(model, trainable_only=True) == 2 + 15


def test_a_multiplication_with_its_addition_is_one() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12, 5)
    )
    convolution, linear = 8 * (4 * 3) * 3 * 9, 5 * 8 * 12
    assert count_multiply_adds(model, (3, 8, 6)) == convolution + linear
    assert count_multiply_adds(model.half(), (3, 8, 6)) == convolution + linear


def test_the_size_is_the_models_own_where_none_is_given() -> None:
    model = nn.Linear(7, 2)
    model.input_size = (7,)  # type: ignore[assignment]
    assert count_multiply_adds(model) == 14
    del model.input_size
    with pytest.raises(ValueError, match=r"input_size \(C,H,W\) is needed: Linear has none"):
        count_multiply_adds(model)


@pytest.mark.parametrize("name", ["se_resnet8_cifar", "se_bn_inception"])
def test_counting_says_nothing_of_the_fused_operator(name: str) -> None:
    """The counter's hooks keep it away, but nothing is computed: a warning would be an error."""
    assert count_multiply_adds(meta_model(name)) > 0
