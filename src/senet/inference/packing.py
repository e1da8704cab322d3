"""Weights in the order in which the C++ kernels read them.

A panel is (depth, PANEL): for each input the weights of PANEL outputs; missing outputs are zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from senet.inference import kernels


def into(values: Tensor) -> Tensor:
    """A copy as float32 in memory of the kernels' own."""
    flat = values.detach().reshape(-1)
    memory = kernels.allocate(flat.numel())
    memory[: flat.numel()].copy_(flat)
    return memory


def panels(matrices: Tensor) -> Tensor:
    """Matrices (G, outputs, depth), one per group → (G, panels, depth, PANEL)."""
    groups, outputs, depth = matrices.shape
    count = math.ceil(outputs / kernels.PANEL)
    padded = matrices.new_zeros(groups, count * kernels.PANEL, depth)
    padded[:, :outputs] = matrices
    return padded.view(groups, count, kernels.PANEL, depth).transpose(2, 3).contiguous()


def panel_bias(bias: Tensor, groups: int) -> Tensor:
    """Biases (C,) → (G, panels, PANEL)."""
    return panels(bias.view(groups, -1, 1))


def merged_groups(groups: int, outputs: int) -> int:
    """How many groups of a grouped convolution with `outputs` channels each become one.

    Narrow groups leave lanes of a vector idle: several of them are run as one dense block with
    zeros off its diagonal.
    """
    lanes = kernels.PANEL // 2
    merge = 1
    while merge * outputs < lanes and merge < groups and groups % (2 * merge) == 0:
        merge *= 2
    return merge


def convolution(weight: Tensor, groups: int, merge: int) -> Tensor:
    """Weight (C, C_in/groups, kh, kw) → panels over kh × kw × input channels."""
    matrices = weight.view(groups, -1, *weight.shape[1:]).permute(0, 1, 3, 4, 2)
    _, outputs, kernel_h, kernel_w, inputs = matrices.shape
    dense = matrices.new_zeros(groups // merge, merge, outputs, kernel_h, kernel_w, merge, inputs)
    for block in range(merge):
        dense[:, block, :, :, :, block] = matrices[block::merge]
    depth = kernel_h * kernel_w * merge * inputs
    return panels(dense.reshape(groups // merge, merge * outputs, depth))


def pairs(weight: Tensor, groups: int) -> Tensor:
    """Weight (C, C_in/groups, kh, kw) → panels of two groups' outputs in turns.

    Those of a last group without another come behind them.
    """
    matrices = weight.permute(0, 2, 3, 1).reshape(groups, weight.shape[0] // groups, -1)
    return torch.cat([part.flatten() for part in _paired(matrices)])


def pair_bias(bias: Tensor, groups: int) -> Tensor:
    """Biases (C,) as the outputs of `pairs`."""
    return torch.cat([part.flatten() for part in _paired(bias.view(groups, -1, 1))])


def _paired(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (G, outputs, depth) → panels of pairs, and of what is left of an odd number."""
    groups, outputs, depth = matrices.shape
    even = groups // 2 * 2
    both = matrices[:even].view(-1, 2, outputs, depth).transpose(1, 2)
    return panels(both.reshape(-1, 2 * outputs, depth)), panels(matrices[even:])


def winograd_matrix(tile: int) -> Tensor:
    """G (tile + 2, 3) of F(tile × tile, 3×3) for the points of winograd.h, in float64."""
    if tile == 2:
        rows = [[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
        return torch.tensor(rows, dtype=torch.float64)
    a, b = 0.5**0.5, 2.0**0.5
    rows = [[1 / (a * b) ** 2, 0.0, 0.0]]
    for point, other in ((a, b), (b, a)):
        scale = 1 / (2 * point**2 * (point**2 - other**2))
        rows += [[scale, sign * scale * point, scale * point**2] for sign in (1, -1)]
    return torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)


def winograd(weight: Tensor, tile: int) -> Tensor:
    """Weight (C, C_in, 3, 3) → (panels, (tile + 2)², C_in, PANEL)."""
    G = winograd_matrix(tile)
    both = torch.kron(G, G)  # ((tile + 2)², 9)
    outputs, inputs = weight.shape[:2]
    count = math.ceil(outputs / kernels.PANEL)
    packed = weight.new_zeros(count, len(both), inputs, kernels.PANEL)
    for panel, part in enumerate(weight.split(kernels.PANEL)):  # bounds the memory in float64
        transformed = both @ part.double().flatten(2).flatten(0, 1).t()
        packed[panel, :, :, : len(part)] = transformed.view(-1, len(part), inputs).mT
    return packed


def taps_stride(channels: int) -> int:
    """Floats from the weights of one tap of C channels to those of the next: whole lines."""
    return (channels + 15) // 16 * 16


def depthwise(weight: Tensor) -> Tensor:
    """Weight (C, 1, kh, kw) → (kh × kw, `taps_stride` of C)."""
    return _padded(weight.flatten(1).t())


def grouped(weight: Tensor) -> Tensor:
    """Weight (C, C/groups, kh, kw) → (kh, kw, C/groups, `taps_stride` of C)."""
    return _padded(weight.permute(2, 3, 1, 0))


def _padded(taps: Tensor) -> Tensor:
    channels = taps.shape[-1]
    return torch.nn.functional.pad(taps, (0, taps_stride(channels) - channels))
