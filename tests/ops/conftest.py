"""The operator's tests on a GPU: SENET_TEST_DEVICE=cuda, as `make test-gpu` sets it."""

import pytest
import torch
from ops_cases import DEVICE

NO_GPU = "NO GPU HERE, NOTHING WAS TESTED: `make test-gpu` needs a CUDA or ROCm device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True, scope="session")
def _device() -> None:
    if DEVICE != "cpu" and torch.cuda.is_available():
        torch.set_default_device(DEVICE)
        torch.backends.cudnn.allow_tf32 = False  # the oracles' convolutions are exact
