"""What an optimized network is made of, in plain PyTorch: the algebra of inference.

Shape suffixes: N images, C channels, h hidden width, * spatial dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet.nn.block import SqueezeExcitation
from senet.ops.activations import LINEAR, RELU, Activation
from senet.ops.triton import tail as triton
from senet.ops.triton.common import takes
from senet.support.shapes import Float

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def batch_norm_affine(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale a and offset b (C,) in float64 with BN(x) = a·x + b in evaluation mode."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    mean, var = bn.running_mean.double(), bn.running_var.double()
    scale = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    offset = -mean * scale
    return scale, offset if bn.bias is None else offset + bn.bias.double()


def two(values: tuple[int, ...], along_height: int = 1) -> tuple[int, int]:
    """Numbers along height and width; one number is that along the width of maps of one row."""
    height, width = values if len(values) == 2 else (along_height, *values)
    return height, width


def constant(value: Tensor, like: Tensor) -> nn.Parameter:
    """`value` as a parameter without gradient, with the dtype and device of `like`."""
    return nn.Parameter(value.detach().to(like.device, like.dtype).contiguous(), False)


class FusedConv(nn.Module):
    """Convolution with all that follows it: y = δ(gates ⊙ (W x + b) + shortcut).

    One of a single spatial dimension is one of maps of a single row.

    Args:
        conv: the convolution; it pads with zeros.
        bn: batch norm behind it, folded into weight and bias in float64.

    Attributes:
        dims: spatial dimensions of its inputs, 1 or 2.
        padding: zeros above and to the left.
        behind: zeros below and to the right.
        same: whether there are instead as many as TensorFlow's "same" needs for an input, those
            behind one more where they are odd: the output has ⌈H/stride⌉ rows.
        activation: δ.
        slopes: with a linear δ: slopes (D,) or (1,) of a PReLU in its place.
    """

    def __init__(
        self, conv: nn.Conv1d | nn.Conv2d, bn: nn.BatchNorm1d | nn.BatchNorm2d | None = None
    ) -> None:
        super().__init__()
        self.dims = len(conv.kernel_size)
        weight = conv.weight.double()
        if self.dims == 1:
            weight = weight.unsqueeze(2)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()
        if bn is not None:
            scale, offset = batch_norm_affine(bn)
            weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + offset
        self.weight, self.bias = constant(weight, conv.weight), constant(bias, conv.weight)
        self.stride, self.dilation = two(conv.stride), two(conv.dilation)
        if isinstance(conv.padding, str):
            total = self._needed() if conv.padding == "same" else (0, 0)
            self.padding = (total[0] // 2, total[1] // 2)
            self.behind = (total[0] - self.padding[0], total[1] - self.padding[1])
        else:
            self.padding = self.behind = two(conv.padding, 0)
        self.same = False
        self.groups = conv.groups
        self.activation: Activation = LINEAR
        self.slopes: nn.Parameter | None = None

    def _needed(self) -> tuple[int, int]:
        """Zeros with which stride 1 keeps the size, along height and width."""
        kernel = self.weight.shape[2:]
        return self.dilation[0] * (kernel[0] - 1), self.dilation[1] * (kernel[1] - 1)

    @property
    def unpadded(self) -> bool:
        """Whether nothing is padded."""
        return not self.same and self.padding == self.behind == (0, 0)

    def pad(self, before: tuple[int, int], behind: tuple[int, int]) -> None:
        """Add zeros around the input, before and behind it along height and width."""
        self.padding = (self.padding[0] + before[0], self.padding[1] + before[1])
        self.behind = (self.behind[0] + behind[0], self.behind[1] + behind[1])

    def zeros(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros before and behind an input of that size, each along height and width."""
        if not self.same:
            return self.padding, self.behind
        before, behind = [], []
        for size, needed, stride in zip((height, width), self._needed(), self.stride, strict=True):
            total: Any = (-(-size // stride) - 1) * stride + needed + 1 - size
            total = torch.sym_max(total, 0)  # under torch.export a size is no number
            before.append(total // 2)
            behind.append(total - total // 2)
        return two(tuple(before)), two(tuple(behind))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of that size."""
        before, behind = self.zeros(height, width)
        sizes = (
            (size + before[i] + behind[i] - self._needed()[i] - 1) // self.stride[i] + 1
            for i, size in enumerate((height, width))
        )
        return two(tuple(sizes))

    def forward(
        self,
        x: Float[Tensor, "n c *s"],
        gates: Float[Tensor, "n d *ones"] | None = None,
        shortcut: Float[Tensor, "n d *t"] | None = None,
    ) -> Float[Tensor, "n d *t"]:
        """(N,C,H,W) → (N,D,A,B), or (N,C,L) → (N,D,M); gates are known beforehand, one per image
        and output channel."""
        if self.dims == 1 and x.ndim == 3:
            gates, shortcut = (
                None if t is None else t.unsqueeze(2) if t.ndim == 3 else t
                for t in (gates, shortcut)
            )
            return self.forward(x.unsqueeze(2), gates, shortcut).squeeze(2)
        padding = self.padding
        if self.same and _sizes_are_free(x):
            return finish(self._padded_by_onnx(x), gates, shortcut, self.activation, self.slopes)
        if self.same or self.padding != self.behind:
            (top, left), (bottom, right) = self.zeros(x.shape[2], x.shape[3])
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        options = (self.stride, padding, self.dilation, self.groups)
        if _in_one_pass(self, x, gates, shortcut):
            y = F.conv2d(x, self.weight, None, *options)
            return _finish_on_gpu(self, y, self.bias, gates, shortcut)
        y = F.conv2d(x, self.weight, self.bias, *options)
        return finish(y, gates, shortcut, self.activation, self.slopes)

    def _padded_by_onnx(self, x: Tensor) -> Tensor:
        """The convolution as ONNX's operator, which pads by itself: no arithmetic on sizes."""
        sizes = [-(-size // step) for size, step in zip(x.shape[2:], self.stride, strict=True)]
        return torch.onnx.ops.symbolic(
            "Conv",
            (x, self.weight, self.bias),
            {
                "auto_pad": "SAME_UPPER",
                "dilations": list(self.dilation),
                "group": self.groups,
                "kernel_shape": list(self.weight.shape[2:]),
                "strides": list(self.stride),
            },
            dtype=x.dtype,
            shape=(x.shape[0], len(self.weight), *sizes),
        )

    def multiply(self, factor: float) -> None:
        """Multiply the convolution's output, before gates and shortcut, by a number."""
        self.weight.mul_(factor)
        self.bias.mul_(factor)

    def take_in(self, scale: Tensor, offset: Tensor) -> None:
        """Let a·y + b follow the convolution, before gates and shortcut; a and b (D,) or ()."""
        a, b = scale.double(), offset.double()
        weight = self.weight.double() * a.reshape(-1, 1, 1, 1)
        bias = self.bias.double() * a + b
        self.weight, self.bias = constant(weight, self.weight), constant(bias, self.bias)

    def extra_repr(self) -> str:
        """Shape, stride and what follows, as `print(model)` shows them."""
        shape = "×".join(map(str, self.weight.shape))
        return f"{shape}, stride={self.stride}, groups={self.groups}, {self.activation.name}"


def _sizes_are_free(x: Tensor) -> bool:
    """Whether an ONNX file is being written that takes images of any size."""
    return torch.onnx.is_in_onnx_export() and not all(isinstance(n, int) for n in x.shape[2:])


def ends_plainly(module: FusedConv | Pointwise) -> bool:
    """Whether a module ends in nothing or in a ReLU."""
    return module.activation in (LINEAR, RELU) and module.slopes is None


def ends_openly(module: FusedConv | Pointwise) -> bool:
    """Whether a module has no activation, so that it can take in what follows."""
    return module.activation == LINEAR and module.slopes is None


def _in_one_pass(module: FusedConv | Pointwise, *tensors: Tensor | None) -> bool:
    """Whether a Triton kernel does what follows a convolution: on a GPU, in eager inference.

    torch.compile fuses the formulas of `finish` itself, and graphs that leave the process hold
    PyTorch's own operators.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not ends_plainly(module):
        return False
    plain = all(t is None or type(t) is Tensor for t in tensors)
    if not plain or tensors[0] is None or not takes(tensors[0]):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def _finish_on_gpu(
    module: FusedConv | Pointwise,
    y: Tensor,
    bias: Tensor | None,
    gates: Tensor | None,
    shortcut: Tensor | None,
) -> Tensor:
    gates = None if gates is None else gates.flatten(1)
    return triton.finish(y, bias, gates, shortcut, module.activation == RELU)


def finish(
    y: Tensor,
    gates: Tensor | None,
    shortcut: Tensor | None,
    activation: Activation,
    slopes: Tensor | None = None,
) -> Tensor:
    """δ(gates ⊙ y + shortcut), each part optional; y (N,C,*), gates (N,C) or (N,C,1,…)."""
    if gates is not None:
        if gates.ndim != y.ndim:
            gates = gates.view(*gates.shape, *(1 for _ in y.shape[2:]))
        gates = gates.to(y.dtype)
        y = y * gates if shortcut is None else torch.addcmul(shortcut, y, gates)
    elif shortcut is not None:
        y = y + shortcut
    return activation(y) if slopes is None else F.prelu(y, slopes)


class AsItIs(nn.Module):
    """A layer that hooks look at: it is called, and never taken into another one.

    Args:
        layer: the layer with its hooks.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer and its hooks give."""
        return self.layer(*args, **kwargs)


class Across(nn.Module):
    """A convolution over the channels of vectors, as the gates of ECA have (arXiv 1910.03151).

    Args:
        conv: a convolution of rows (N,1,C) that keeps their length.

    Attributes:
        conv: the same; it may end in an activation.
    """

    def __init__(self, conv: FusedConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Float[Tensor, "n c *ones"]) -> Float[Tensor, "n c *ones"]:
        """Vectors (N,C,1,1) or (N,C,1) → the same shape."""
        return self.conv(x.flatten(1).unsqueeze(1)).reshape(x.shape)


class Shuffle(nn.Module):
    """Channels of so many groups taken in turns, as in ShuffleNet (arXiv 1707.01083).

    Args:
        groups: groups of the input.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """(N,C,H,W) → the same shape."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class Pointwise(nn.Module):
    """What no convolution takes up: y = δ(gates ⊙ f·(a·x + b) + shortcut).

    Each part is optional.

    Args:
        bn: batch norm that gives a and b.

    Attributes:
        factor: f.
        activation: δ.
        slopes: with a linear δ: slopes (C,) or (1,) of a PReLU in its place.
    """

    def __init__(self, bn: BatchNorm | None = None) -> None:
        super().__init__()
        self.scale: nn.Parameter | None = None
        self.offset: nn.Parameter | None = None
        if bn is not None:
            assert bn.running_mean is not None
            scale, offset = batch_norm_affine(bn)
            self.scale, self.offset = (constant(t, bn.running_mean) for t in (scale, offset))
        self.factor = 1.0
        self.activation: Activation = LINEAR
        self.slopes: nn.Parameter | None = None

    def multiply(self, factor: float) -> None:
        """Multiply the output, before gates and shortcut, by a number."""
        self.factor *= factor

    def take_in(self, scale: Tensor, offset: Tensor, like: Tensor) -> None:
        """Let a·y + b follow, before gates and shortcut; a and b (C,), kept in `like`'s type."""
        a, b = scale.double() * self.factor, offset.double()
        if self.scale is not None and self.offset is not None:
            a, b = a * self.scale.double(), b + a * self.offset.double()
        self.scale, self.offset, self.factor = constant(a, like), constant(b, like), 1.0

    def forward(
        self, x: Tensor, gates: Tensor | None = None, shortcut: Tensor | None = None
    ) -> Tensor:
        """X (N,C,*) → the same shape."""
        if self.scale is not None and self.offset is not None:
            each = (-1, *(1 for _ in x.shape[2:]))
            x = torch.addcmul(self.offset.view(each), x, self.scale.view(each))
        if self.factor != 1:
            x = x * self.factor
        if _in_one_pass(self, x, gates, shortcut):
            return _finish_on_gpu(self, x, None, gates, shortcut)
        return finish(x, gates, shortcut, self.activation, self.slopes)


def axis_taps(x: Tensor, kernel: int, padding: int, dilation: int) -> tuple[list[Tensor], int]:
    """For each tap of a kernel along the last axis the sum of the inputs it sees; output count.

    With zero padding a tap does not see some of the border: that is taken off the sum over all
    (docs/algebra.md, section 3).
    """
    outputs = x.shape[-1] + 2 * padding - dilation * (kernel - 1)
    total = x.sum(-1)
    taps = []
    for tap in range(kernel):
        first = tap * dilation - padding
        unseen = [x[..., : max(first, 0)]]
        if first + outputs < x.shape[-1]:
            unseen.append(x[..., max(first + outputs, 0) :])
        taps.append(total - sum(part.sum(-1) for part in unseen))
    return taps, outputs


def tap_means(
    u: Float[Tensor, "n c h w"],
    kernel: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Float[Tensor, "n t c"]:
    """Mean over the outputs of a convolution of stride 1 of the inputs that each tap sees.

    Returns:
        (N, taps, C), taps in row order of the kernel, in float32 at least.
    """
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    columns, width = axis_taps(wide, kernel[1], padding[1], dilation[1])
    rows = [axis_taps(part, kernel[0], padding[0], dilation[0]) for part in columns]
    means = [rows[j][0][i] for i in range(kernel[0]) for j in range(kernel[1])]
    return torch.stack(means, 1) / (width * rows[0][1])


class SqueezeGate(nn.Module):
    """The gates of an SE block, computed before the convolution that they scale.

    The mean commutes with a convolution v = W u + b: z = W·mean(u) + b (docs/algebra.md, section
    3), and W multiplies into the first fully connected layer, so the squeeze reads the
    convolution's input and not its larger output. Without one it reads the map itself.

    Args:
        se: SE block with the squeeze "avg".
        conv: the convolution before it, without ReLU.
    """

    def __init__(self, se: SqueezeExcitation, conv: FusedConv | None = None) -> None:
        super().__init__()
        first = se.fc1.weight.double()
        bias = first.new_zeros(len(first)) if se.fc1.bias is None else se.fc1.bias.double()
        if conv is not None:
            weight = conv.weight.double().flatten(2)  # (C, C_in, taps)
            bias = bias + first @ conv.bias.double()
            first = torch.einsum("hc,cit->hti", first, weight).flatten(1)
        last = se.fc2.weight
        bias2 = last.new_zeros(len(last)) if se.fc2.bias is None else se.fc2.bias
        self.weight1, self.bias1 = constant(first, last), constant(bias, last)
        self.weight2, self.bias2 = constant(last, last), constant(bias2, last)
        self.activation, self.gate, self.gate_name = se.activation, se.gate, se.gate_name
        self.geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None
        if conv is not None and (conv.weight.shape[2:] != (1, 1) or conv.padding != (0, 0)):
            kernel = (conv.weight.shape[2], conv.weight.shape[3])
            self.geometry = (kernel, conv.padding, conv.dilation)

    def forward(self, u: Float[Tensor, "n c *s"]) -> Float[Tensor, "n d"]:
        """Gates (N,D) for the input u (N,C,H,W) or (N,C,L) of the convolution."""
        if self.geometry is None:
            wide = torch.promote_types(u.dtype, torch.float32)
            means = u.mean(tuple(range(2, u.ndim)), dtype=wide)
        else:
            means = tap_means(u if u.ndim == 4 else u.unsqueeze(2), *self.geometry).flatten(1)
        hidden = self.activation(F.linear(means.to(self.weight1.dtype), self.weight1, self.bias1))
        return self.gate(F.linear(hidden, self.weight2, self.bias2))
