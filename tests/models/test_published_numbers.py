"""Parameters and multiply-adds against the paper (tables 2, 10, 13, 15) and timm."""

import pytest
import timm
import torch

from senet.complexity import count_multiply_adds, count_parameters, meta_model
from senet.models import list_models

# Table 2, GFLOPs (multiply-adds): plain, and with SE. The released structure ("caffe").
# The paper's SE column counts the pooling and the scaling too (2·C·H·W for each block, 0.011 G
# for ResNet-50); PyTorch counts convolutions and matrix products.
PAPER_GFLOPS = {
    "resnet50": (3.86, 3.87),
    "resnet101": (7.58, 7.60),
    "resnet152": (11.30, 11.32),
    "resnext50_32x4d": (4.24, 4.25),
    "resnext101_32x4d": (7.99, 8.00),
}


@pytest.mark.parametrize("name", PAPER_GFLOPS)
def test_multiply_adds_of_table_2(name):
    plain = count_multiply_adds(meta_model(name, variant="caffe")) / 1e9
    excited = count_multiply_adds(meta_model(f"se_{name}", variant="caffe")) / 1e9
    paper_plain, paper_excited = PAPER_GFLOPS[name]
    assert plain == pytest.approx(paper_plain, abs=0.025)
    assert excited == pytest.approx(paper_excited, abs=0.04)
    assert (excited - plain) / plain < 0.01


PARAMETERS = {
    # row: network, options, parameters in millions as the paper prints them
    "plain": ("resnet50", {}, 25.6),
    "r=2": ("se_resnet50", {"reduction": 2}, 45.7),
    "r=4": ("se_resnet50", {"reduction": 4}, 35.7),
    "r=8": ("se_resnet50", {"reduction": 8}, 30.7),
    "r=16": ("se_resnet50", {"reduction": 16}, 28.1),
    "r=32": ("se_resnet50", {"reduction": 32}, 26.9),
    "stage 2": ("se_resnet50", {"stages": (2,)}, 25.6),
    "stage 3": ("se_resnet50", {"stages": (3,)}, 25.7),
    "stage 4": ("se_resnet50", {"stages": (4,)}, 26.4),
    "SE_3x3": ("se_resnet50", {"integration": "3x3"}, 25.8),
    "NoSqueeze": ("se_resnet50", {"squeeze": "none"}, 28.1),
}


@pytest.mark.parametrize("row", PARAMETERS)
def test_parameters_of_tables_10_13_15_and_16(row):
    """To the digit printed, if the two running statistics of each BN channel are counted.

    Caffe keeps them beside the weights. Only r = 2 differs: 45.75 M, of which the paper prints
    45.7.
    """
    name, options, millions = PARAMETERS[row]
    model = meta_model(name, **options)
    statistics = sum(b.numel() for key, b in model.named_buffers() if "running" in key)
    counted = count_parameters(model) + statistics
    if row == "r=2":
        assert counted == 45_752_360
    else:
        assert round(counted / 1e6, 1) == millions


def test_multiply_adds_of_no_squeeze():
    """Table 16: 4.27 GFLOPs."""
    model = meta_model("se_resnet50", squeeze="none", variant="caffe")
    assert count_multiply_adds(model) / 1e9 == pytest.approx(4.27, abs=0.03)


CIFAR_PARAMETERS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}


@pytest.mark.parametrize("name", CIFAR_PARAMETERS)
def test_parameters_of_cifar_networks(name):
    """He et al. (arXiv 1512.03385), table 6, in millions."""
    parameters = count_parameters(meta_model(f"{name}_cifar"))
    assert round(parameters / 1e6, 2) == CIFAR_PARAMETERS[name]


@pytest.mark.parametrize(("name", "millions"), [("resnet110", 1.7), ("resnet164", 1.7)])
def test_parameters_of_deep_cifar_networks(name, millions):
    parameters = count_parameters(meta_model(f"{name}_cifar"))
    assert round(parameters / 1e6, 1) == millions


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
}


@pytest.mark.parametrize("name", TIMM)
def test_parameters_equal_timm(name):
    with torch.device("meta"):
        peer = timm.create_model(TIMM[name])
    ours = meta_model(name)
    assert count_parameters(ours) == count_parameters(peer)
    assert count_multiply_adds(ours) == count_multiply_adds(peer, (3, 224, 224))


def test_every_imagenet_network_is_compared():
    """se_resnet18 and 34 differ from timm's, which rounds their hidden widths up to 8."""
    missing = {name for name in list_models() if not name.endswith("_cifar")} - set(TIMM)
    assert missing == {"se_resnet18", "se_resnet34", "senet154_plain"}
