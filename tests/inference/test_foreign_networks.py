"""Networks of timm and torchvision, with statistics and biases as after training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from senet import kernels
from senet.inference import chains, optimize
from senet.inference.modules import FusedConv, Pointwise
from senet.inference.rounding import difference
from senet.inference.steps import TorchStep
from senet.kernels.structs import Kind
from senet.networks.anywhere import open_source

# Name, and how many SE blocks it has.
NETWORKS = {
    "timm:mobilenetv3_small_050": 9,
    "timm:tf_mobilenetv3_small_minimal_100": 0,  # padding to the same size
    "timm:tf_efficientnetv2_b0": 16,  # and SE, SiLU
    "timm:ghostnet_050": 7,
    "timm:rexnet_100": 13,  # additions to a part of the channels
    "timm:regnety_002": 13,
    "timm:repghostnet_050": 7,
    "timm:test_nfnet": 4,  # standardised weights, products with numbers
    "timm:test_byobnet": 4,
    "timm:repvgg_a0": 0,
    "timm:ese_vovnet19b_slim_dw": 4,
    "torchvision:mobilenet_v3_small": 9,
    "torchvision:regnet_y_400mf": 16,
}


@torch.no_grad()
def trained(name: str) -> nn.Module:
    model = open_source(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            module.momentum = 1.0
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.normal_(bias, 0, 0.2)
    model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_everything_is_known(name: str) -> None:
    """No operation of these is left to PyTorch but what a convolution or a pass ends in."""
    model, x = trained(name), torch.randn(2, 3, 64, 64)
    fast = optimize(model, x)
    assert not fast.report.left
    assert list(fast.report.blocks.values()) == ["fused"] * NETWORKS[name]
    exact = copy.deepcopy(model).double()
    for images in (x, torch.randn(1, 3, 96, 64)):
        wanted = model(images)
        limit = max(1e-5, 6 * difference(wanted.double(), exact(images.double())))
        assert difference(fast(images), wanted) <= limit
        assert difference(fast.network.graph_module(images), wanted) <= limit
    if not kernels.MISSING:
        graph = fast.network.graph_module
        steps = fast.network.plans(x).program(x).parts
        nodes = [step.node for step in steps if isinstance(step, TorchStep)]
        assert all(node.op == "call_module" for node in nodes), nodes
        modules = {type(graph.get_submodule(str(node.target))) for node in nodes}
        assert modules <= {FusedConv, Pointwise}


@torch.no_grad()
@pytest.mark.skipif(bool(kernels.MISSING), reason=kernels.MISSING)
@pytest.mark.parametrize(
    "name", ["timm:repghostnet_050", "timm:rexnet_100", "timm:mobilenetv3_small_050"]
)
def test_whatever_can_be_a_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where maps are small; depthwise convolutions with a shortcut are none."""
    monkeypatch.setattr(chains, "_MOVED", math.inf)
    monkeypatch.setattr(chains, "_WIDE_BYTES", 0)
    # A chain is for as many images as there are threads, or for large ones.
    model, x = trained(name), torch.randn(torch.get_num_threads(), 3, 64, 64)
    fast = optimize(model, x, measure=False)
    plans = fast.network.plans(x)
    assert plans is not None
    (part,) = plans.program(x).parts
    assert sum(step.kind == Kind.CHAIN for step in part.steps) > 2
    assert difference(fast(x), model(x)) <= 1e-5
