"""The shortcut without parameters of CIFAR's residual networks, alone and beside a convolution."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.nn.block import hooked
from senet.nn.convolution import plain
from senet.support.shapes import Float


class PaddedShortcut(nn.Module):
    """Shortcut without parameters: every second position, new channels zero.

    He et al. (arXiv 1512.03385), section 4.2, option A, as used on CIFAR.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d a b"]:
        """X (N,C,H,W) → (N, C + new, ⌈H/stride⌉, ⌈W/stride⌉)."""
        # Every second position; slices would cost a map of zeros each in the backward pass.
        x = F.avg_pool2d(x, 1, self.stride)
        before = self.new_channels // 2
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


def beside(shortcut: nn.Module | None, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """layer(x) and shortcut(x) together, to the bit what they give one after the other.

    Args:
        shortcut: of a block.
        layer: the first convolution of its branch.
        x: the block's input.

    Returns:
        Both outputs; None where they have to be computed one after the other: the shortcut is no
        `PaddedShortcut`, the layer no plain convolution without padding or hooks, x no float32 map
        in channels_last on the CPU, or somebody looks at single operations.
    """
    if (
        torch.compiler.is_compiling()
        or type(shortcut) is not PaddedShortcut
        or type(layer) is not nn.Conv2d
        or layer.groups != 1
        or not plain(layer, x)
        or hooked(shortcut)
    ):
        return None
    outputs: tuple[Tensor, Tensor] = _Beside.apply(
        x, layer.weight, layer.stride, layer.padding, shortcut.stride, shortcut.new_channels
    )
    return outputs


class _Beside(torch.autograd.Function):
    """A convolution, and every second position of its input among channels of zeros.

    As two functions they would cost a map of zeros with the shortcut's gradient in it, and one more
    pass to add this to the convolution's. As one, it is added to the convolution's in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        step: int,
        new: int,
    ) -> tuple[Tensor, Tensor]:
        before = new // 2
        ctx.save_for_backward(x, weight)
        ctx.convolution = stride, padding
        ctx.taken = slice(before, before + x.shape[1]), step
        y = torch.conv2d(x, weight, None, stride, padding)
        taken = x[:, :, ::step, ::step]
        size = (taken.shape[0], taken.shape[1] + new, *taken.shape[2:])
        shortcut = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        shortcut.zero_()[:, before : before + x.shape[1]] = taken
        return y, shortcut

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dshortcut: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (stride, padding), (channels, step) = ctx.convolution, ctx.taken
        wanted = [*ctx.needs_input_grad[:2], False]
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )
        if wanted[0]:
            dx[:, :, ::step, ::step] += dshortcut[:, channels]
        return dx, dweight, None, None, None, None
