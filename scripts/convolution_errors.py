"""Rounding errors of the 3x3 convolutions of a trained network, on its own maps and gradients.

Usage: python scripts/convolution_errors.py RUN PLACE [--images N]

RUN is a run's folder or a checkpoint of a network of ours, PLACE what `senet evaluate --data`
takes. A shuffled batch of training images goes forward and backward through the network, with batch
statistics. The three passes of every convolution that senet's kernels compute are computed again by
these kernels, by PyTorch and in float64. Prints, of each pass, root mean squares of the errors over
that of the exact numbers: their geometric mean over the layers, and the largest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import geometric_mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.bench.convolutions import PASSES
from senet.checkpoint.files import open_checkpoint
from senet.data import Augmentation, load_data, train_loader
from senet.ops import convolution


def padding_of(layer: nn.Conv2d) -> tuple[int, ...]:
    """Its padding along H and W, which our networks give in numbers."""
    assert not isinstance(layer.padding, str), layer
    return layer.padding


def passes_of(layer: nn.Conv2d, x: Tensor, gradient: Tensor, by: str) -> list[Tensor]:
    """Output and both gradients: by "senet", "torch", or in float64 by "exact"."""
    x, weight = x.detach(), layer.weight.detach()
    if by == "exact":
        x, weight, gradient = x.double(), weight.double(), gradient.double()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    if by == "senet":
        with convolution.use("senet"):
            y = convolution.convolve(
                x, weight, stride=layer.stride, padding=padding_of(layer), groups=layer.groups
            )
            return [y.detach(), *torch.autograd.grad(y, (x, weight), gradient)]
    y = F.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), gradient)]


def main() -> None:
    """Parse, run the batch, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("place")
    parser.add_argument("--images", type=int, default=128)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.run)
    model = checkpoint.model.to(memory_format=torch.channels_last).train()
    data = load_data(options.place)
    loader = train_loader(data, Augmentation(), batch_size=options.images, seed=0, num_workers=0)
    x, y = next(iter(loader))
    seen: list[tuple[nn.Conv2d, Tensor, Tensor]] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        output.register_hook(lambda gradient: seen.append((layer, inputs[0], gradient)))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(look)
    x = x.contiguous(memory_format=torch.channels_last)
    F.cross_entropy(model(x), y).backward()
    found: dict[str, list[list[float]]] = {"senet": [[], [], []], "torch": [[], [], []]}
    for layer, maps, gradient in seen:
        sizes = tuple(maps.shape), tuple(layer.weight.shape), layer.stride, padding_of(layer)
        with convolution.use("senet"):
            if not convolution.passes(*sizes, layer.groups).forward:
                continue
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        exact = passes_of(layer, maps, gradient, "exact")
        for by, rows in found.items():
            for row, mine, right in zip(
                rows, passes_of(layer, maps, gradient, by), exact, strict=True
            ):
                wrong = (mine.double() - right).square().mean().sqrt()
                row.append(float(wrong / right.square().mean().sqrt()))
    print(f"{len(found['senet'][0])} convolutions; root mean square error, mean (largest)")
    for index, name in enumerate(PASSES):
        texts = [
            f"{by} {geometric_mean(rows[index]):.1e} ({max(rows[index]):.1e})"
            for by, rows in found.items()
        ]
        print(f"{name}: {', '.join(texts)}")


if __name__ == "__main__":
    main()
