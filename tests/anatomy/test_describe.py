"""What SE blocks cost, counted in the graph."""

import pytest
import timm
import torch
import torchvision
from foreign_blocks import Body, HFRegNetSE, ScSE

import senet
from senet.anatomy import describe
from senet.anatomy.describe import multiply_adds
from senet.anatomy.excitations import trace_of
from senet.models.cost import count_multiply_adds

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def test_rows_hold_what_was_found_and_what_it_costs() -> None:
    model = Body(HFRegNetSE(16), "twice").eval()
    (row,) = describe(model, X)
    assert (row.name, row.stage, row.channels, row.places) == ("blocks.0", 2, 16, (6, 6))
    assert (row.scales, row.squeeze) == ("batch_norm in bn", "avg")
    assert row.program == "conv2d 16→4, relu, conv2d 4→16"
    assert (row.gate, row.limits, row.shift) == ("sigmoid", (0, 1), False)
    assert (row.calls, row.parameters, row.multiply_adds) == (2, 148, 256)
    # stem 3·9·16 and last layer 16·8 at 36 positions, head 8·5.
    assert row.multiply_adds_share == pytest.approx(256 / (256 + 36 * (432 + 128) + 40))
    assert row.time_share is None


def test_time_is_shared_out_among_all_operations() -> None:
    rows = describe(Body(ScSE(16)).eval(), X, runs=2)
    assert [row.name for row in rows] == ["blocks.0.mul"]
    assert 0 < rows[0].time_share < 1


@pytest.mark.parametrize(
    "model",
    [
        lambda: torchvision.models.regnet_y_400mf(),
        lambda: timm.create_model("mobilenetv3_small_050"),
        lambda: senet.create_model("se_resnet18"),
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None
        ),
    ],
)
def test_multiply_adds_are_those_of_the_counter(model) -> None:
    network = model().to("meta").eval()
    counted = sum(multiply_adds(node) for node in trace_of(network, _meta(64)).nodes)
    assert counted == count_multiply_adds(network, (3, 64, 64))


def test_transposed_convolutions_count_by_their_input() -> None:
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3, 2), torch.nn.Conv2d(6, 2, 1))
    x = torch.zeros(1, 4, 5, 5)
    counted = sum(multiply_adds(node) for node in trace_of(model, x).nodes)
    assert counted == count_multiply_adds(model, (4, 5, 5)) == 25 * 4 * 54 + 121 * 12


class Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.flatten(2).transpose(1, 2)[:, None]
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return torch.einsum("nhlc,kc->nlk", y, torch.ones(5, 3, device=x.device))


def test_attention_is_counted() -> None:
    counted = sum(
        multiply_adds(node) for node in trace_of(Attention(), torch.ones(1, 3, 4, 4)).nodes
    )
    assert counted == count_multiply_adds(Attention(), (3, 4, 4)) == 2 * 16 * 16 * 3 + 16 * 15


def _meta(side: int) -> torch.Tensor:
    return torch.zeros(1, 3, side, side, device="meta")
