"""A small MobileNet for images of 32×32 pixels, with and without SE.

MobileNet (arXiv 1704.04861) with a quarter of its channels whose first convolution has stride 1, so
that the last maps are 2×2. For docs/results.md:

    senet train --model scripts/mobilenet_cifar.py:plain --data cifar10
    senet train --model scripts/mobilenet_cifar.py:se16 --data cifar10
"""

from typing import Any

from torch import nn

from senet import create_model

WIDTH = 0.25


def _small(name: str, num_classes: int, **options: Any) -> nn.Module:
    model = create_model(name, width=WIDTH, num_classes=num_classes, **options)
    model.conv1.stride = (1, 1)
    return model


def plain(num_classes: int = 10) -> nn.Module:
    """Without SE."""
    return _small("mobilenet", num_classes)


def se16(num_classes: int = 10) -> nn.Module:
    """With the paper's blocks, reduction 16."""
    return _small("se_mobilenet", num_classes, reduction=16)


def se4(num_classes: int = 10) -> nn.Module:
    """With reduction 4."""
    return _small("se_mobilenet", num_classes, reduction=4)
