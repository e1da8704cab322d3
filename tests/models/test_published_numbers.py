"""Parameters and multiply-adds against timm, and against He et al. for CIFAR.

Those of the SENet paper are in cards.toml and tests/models/test_cards.py.
"""

import pytest
import timm
import torch

from senet.models.cost import count_multiply_adds, count_parameters, meta_model

CIFAR_PARAMETERS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}


@pytest.mark.parametrize("name", CIFAR_PARAMETERS)
def test_parameters_of_cifar_networks(name):
    """He et al. (arXiv 1512.03385), table 6, in millions."""
    parameters = count_parameters(meta_model(f"{name}_cifar"))
    assert round(parameters / 1e6, 2) == CIFAR_PARAMETERS[name]


DEEP_CIFAR = {
    # millions in 1603.05027, 1605.07146 (11.0) and 1705.07485 (26.2, 34.4)
    "resnet110": 1.7,
    "resnet164": 1.7,
    "wrn16_8": 11.0,
    "shake_shake26_2x96d": 26.2,
    "shake_even29_2x4x64d": 34.4,
}


@pytest.mark.parametrize("name", DEEP_CIFAR)
def test_parameters_of_deep_cifar_networks(name):
    parameters = count_parameters(meta_model(f"{name}_cifar"))
    assert round(parameters / 1e6, 1) == DEEP_CIFAR[name]


def test_width_of_mobilenet():
    """1704.04861, table 7: 0.5 has 1.3 M parameters and 149 M multiply-adds."""
    half = meta_model("mobilenet", width=0.5)
    assert round(count_parameters(half) / 1e6, 1) == 1.3
    assert round(count_multiply_adds(half) / 1e6) == 149


TIMM = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnext50_32x4d": "resnext50_32x4d",
    "resnext101_32x4d": "resnext101_32x4d",
    "se_resnet50": "seresnet50",
    "se_resnet101": "seresnet101",
    "se_resnet152": "seresnet152",
    "se_resnext50_32x4d": "seresnext50_32x4d",
    "se_resnext101_32x4d": "seresnext101_32x4d",
    "senet154": "senet154",
    "resnext101_32x8d": "resnext101_32x8d",
    "resnext101_64x4d": "resnext101_64x4d",
    "se_resnext101_32x8d": "seresnext101_32x8d",
    "se_resnext101_64x4d": "seresnext101_64x4d",
    "inception_v3": "inception_v3",
    "inception_resnet_v2": "inception_resnet_v2",
    "vgg16_bn": "vgg16_bn",
}


@pytest.mark.parametrize("name", TIMM)
def test_parameters_equal_timm(name):
    with torch.device("meta"):
        peer = timm.create_model(TIMM[name])
    ours = meta_model(name)
    assert count_parameters(ours) == count_parameters(peer)
    assert count_multiply_adds(ours) == count_multiply_adds(peer, ours.input_size)
