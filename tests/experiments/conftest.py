"""A data set, made once for each file of tests; nobody writes into it."""

from pathlib import Path

import pytest
from cli_tools import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))
