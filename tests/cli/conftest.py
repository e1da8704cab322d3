"""A data set and a run of it, made once for each file of tests; nobody writes into them."""

from pathlib import Path

import pytest
from cli_tools import make_data, train_flags

from senet.__main__ import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([str(flag) for flag in train_flags(data, out)]) == 0
    return out
