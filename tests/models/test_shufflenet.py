"""ShuffleNet's unit, written out: no peer has it."""

import pytest
import torch
import torch.nn.functional as F

from senet.models.network import SEOptions
from senet.models.shufflenet import ShuffleUnit, channel_shuffle


def test_channels_are_dealt_out() -> None:
    """Two channels a group: the first of each, then the second of each (1707.01083, figure 1)."""
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert channel_shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("stride", [1, 2])
def test_unit(stride: int) -> None:
    """Grouped 1×1, ReLU, shuffle, depthwise 3×3 without ReLU, grouped 1×1, SE, the shortcut."""
    unit = ShuffleUnit(24, 24 * stride, stride, 3, 3, SEOptions(gate="tanh")).eval()
    for bn in (unit.bn1, unit.bn2, unit.bn3):
        torch.nn.init.normal_(bn.bias)
        torch.nn.init.normal_(bn.running_mean, 0, 0.1)
    x = torch.relu(torch.randn(2, 24, 7, 5))

    out = F.relu(unit.bn1(F.conv2d(x, unit.conv1.weight, groups=3)))
    width = out.shape[1]
    out = torch.stack([out[:, i % 3 * (width // 3) + i // 3] for i in range(width)], 1)
    out = unit.bn2(F.conv2d(out, unit.conv2.weight, None, stride, 1, groups=width))
    out = unit.bn3(F.conv2d(out, unit.conv3.weight, groups=3))
    hidden = F.relu(unit.se.fc1(out.mean((2, 3))))
    out = out * torch.tanh(unit.se.fc2(hidden))[:, :, None, None]
    if stride == 1:
        expected = F.relu(x + out)
    else:
        expected = torch.cat([F.avg_pool2d(x, 3, 2, 1), F.relu(out)], 1)
    torch.testing.assert_close(unit(x), expected)
