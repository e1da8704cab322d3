"""Every published count is recomputed: ours exactly, the paper's to the digits it gives."""

import pytest

from senet.models import entry, list_models
from senet.models.cards import cards
from senet.models.cost import count_multiply_adds, count_parameters, meta_model
from senet.models.paper import (
    paper_rows,
    published_multiply_adds,
    recount,
    stage_costs,
    stage_counts,
)

# Networks that the paper does not have.
BEYOND = {f"{se}resnet{depth}" for se in ("", "se_") for depth in (18, 34)}
BEYOND |= {f"{se}resnext{size}" for se in ("", "se_") for size in ("26_32x4d", "101_32x8d")}
BEYOND |= {f"{se}resnext101_64x4d" for se in ("", "se_")}
BEYOND |= {f"{se}resnet{depth}_cifar" for se in ("", "se_") for depth in (8, 20, 32, 44, 56)}


def agrees(value, printed):
    """Whether `value` rounds to the number that the paper prints."""
    digits = len(printed.partition(".")[2])
    return f"{value:.{digits}f}" == printed


@pytest.mark.parametrize("name", cards())
def test_counts(name):
    card = cards()[name]
    counts = recount(name)
    assert counts.parameters == card.parameters
    assert counts.multiply_adds == card.multiply_adds
    agreements = []
    if card.paper_parameters:
        agreements.append(agrees(counts.published_parameters / 1e6, card.paper_parameters))
    if card.paper_gflops:
        agreements.append(agrees(counts.published_multiply_adds / 1e9, card.paper_gflops))
    # A difference needs a reason, and a reason a difference.
    assert (card.why is not None) == (not all(agreements))
    assert bool(agreements) == (card.source is not None)


def test_every_network_of_the_paper_has_its_card():
    assert set(list_models()) - BEYOND == {name for name in cards() if name in list_models()}
    assert {card.network for card in cards().values()} <= set(list_models())


def test_every_table_is_there():
    """Tables 2 to 6 and 10 to 16 of the paper, with as many rows."""
    rows: dict[str, int] = {}
    for card in cards().values():
        for result in card.results:
            rows[result.source] = rows.get(result.source, 0) + 1
    assert rows == {
        "table 2": 16,
        "released": 7,
        "table 3": 4,
        "table 4": 8,
        "table 5": 8,
        "table 6": 2,
        "table 10": 6,
        "table 11": 2,
        "table 12": 3,
        "table 13": 5,
        "table 14": 4,
        "table 15": 1,
        "table 16": 1,
    }


def test_se_is_better_in_every_row_of_table_2():
    for name, card in cards().items():
        if card.source == "table 2" and entry(card.network).se and name in list_models():
            plain = cards()[entry(name).twin]
            assert card.results[0].top1 < plain.results[0].top1


def test_paper_counts_squeezes_scalings_and_additions():
    """By hand for SE-ResNet-50: two passes over each block's output, the addition being one."""
    outputs = 256 * 56**2 * 3 + 512 * 28**2 * 4 + 1024 * 14**2 * 6 + 2048 * 7**2 * 3
    for name, passes in (("resnet50", 1), ("se_resnet50", 2)):
        model = meta_model(name)
        assert published_multiply_adds(model) == count_multiply_adds(model) + passes * outputs


def test_printed_and_recomputed_counts_of_the_papers_tables():
    rows = {row.network: row for row in paper_rows()}
    assert len(rows) == 10
    assert rows["resnet50"].plain == ("24.80", "7.48", "3.86", "3.863", "25.6", "25.6")
    assert rows["resnet50"].se == ("23.29", "6.62", "3.87", "3.872", "28.1", "28.1")


@pytest.mark.parametrize("name", ["se_resnet50", "vgg16_bn", "se_inception_v3"])
def test_stages_add_up(name):
    model = meta_model(name)
    counts = stage_counts(model)
    assert sum(parameters for parameters, _ in counts.values()) == count_parameters(model)
    assert sum(products for _, products in counts.values()) == count_multiply_adds(model)
    assert list(counts) == ["stem", *(f"stage {n}" for n in model.stages), "classifier"]


def test_what_se_adds_to_each_stage():
    added = {cost.part: cost.se for cost in stage_costs("se_resnet50")}
    assert added["stem"] == added["classifier"] == (0, 0)
    assert added["stage 5"][0] == 3 * (2 * 2048 * 128 + 2048 + 128)
    assert sum(parameters for parameters, _ in added.values()) == 28_088_024 - 25_557_032
    assert all(cost.se is None for cost in stage_costs("resnet50"))
