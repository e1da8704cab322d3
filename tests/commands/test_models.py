"""The table of networks is what counting them gives."""

import pytest

from senet.commands.models import network_sizes
from senet.models import list_models
from senet.models.cost import count_multiply_adds, count_parameters, meta_model

SIZES = network_sizes()


def test_all_networks_are_in_it() -> None:
    assert sorted(size.name for size in SIZES) == list_models()


@pytest.mark.parametrize("size", SIZES[::5], ids=lambda size: size.name)
def test_sizes(size) -> None:
    model = meta_model(size.name)
    assert size.input_size == tuple(model.input_size)
    assert size.parameters == count_parameters(model)
    assert size.multiply_adds == count_multiply_adds(model)
