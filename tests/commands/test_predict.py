"""The engines of `senet predict` against the network itself."""

import pytest
import torch

from senet.commands.predict import ENGINES, make_engine
from senet.errors import UserError
from senet.networks.create import create_model

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)
# The exporters' own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ENGINES)
def test_engines_give_the_networks_logits(name: str) -> None:
    model = create_model("se_resnet8_cifar", num_classes=10, reduction=4).eval()
    x = torch.randn(4, 3, 32, 32)
    run = make_engine(name, model, x)
    for images in (x, x[:3]):
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(run(images), expected, rtol=1e-4, atol=1e-5)


def test_unknown_engine() -> None:
    with pytest.raises(UserError, match="engine must be one of eager, optimized"):
        make_engine("fast", torch.nn.Identity(), torch.randn(1, 3, 32, 32))
