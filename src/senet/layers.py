"""The SE block as a module, and the tails of residual blocks that contain it.

Shape suffixes: N images, C channels, h hidden width, * spatial dimensions.
"""

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet import ops
from senet.ops.maps import full_precision
from senet.sync_bn import SyncBatchNorm

Squeeze = Literal["avg", "max", "none"]
GateName = Literal["sigmoid", "tanh", "relu", "hard_sigmoid", "identity_sigmoid"]

SQUEEZES: tuple[str, ...] = get_args(Squeeze)


class IdentitySigmoid(nn.Module):
    """2·sigmoid(t), which is exactly 1 at t = 0.

    A plain sigmoid never reaches 1, so a block that is inserted into a trained network would
    change it. This gate with a zero last layer leaves every map as it is, with a live gradient.
    """

    def forward(self, t: Tensor) -> Tensor:
        """Gate values in (0, 2), same shape and dtype as `t`."""
        return 2 * torch.sigmoid(t)


GATES: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "hard_sigmoid": nn.Hardsigmoid,
    "identity_sigmoid": IdentitySigmoid,
}


def hidden_width(channels: int, reduction: float) -> int:
    """Width of the layer between the two fully connected ones: floor(C / r), at least 1.

    The released models round down and never to a multiple of 8 (the authors' Caffe definitions).
    """
    return max(1, int(channels / reduction))


class GlobalSqueeze(nn.Module):
    """Squeeze (eq. 2): one number per channel and image, in float32 at least.

    float16 and bfloat16 maps are reduced in float32: a sum over 112×112 float16 values overflows
    long before their mean does.

    Args:
        method: "avg" for the mean over all positions (the paper's choice), "max" for the maximum
            (table 11), "none" to keep the map (the paper's NoSqueeze, table 16).
    """

    def __init__(self, method: Squeeze) -> None:
        super().__init__()
        self.method = method

    def forward(
        self, x: Float[Tensor, "n c *s"], mask: Bool[Tensor, "n 1 *s"] | None = None
    ) -> Float[Tensor, "n c *t"]:
        """Reduce x (N,C,*) to (N,C,1,…), or return it as it is for "none".

        `mask` is True where a position counts; an image without any such position squeezes to 0.
        """
        if self.method == "none":
            return x
        positions = tuple(range(2, x.ndim))
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.method == "avg":
            if mask is None:
                return x.mean(positions, keepdim=True, dtype=wide)
            kept = torch.where(mask, x, 0)  # not x·mask: padding may hold NaN
            count = mask.sum(positions, keepdim=True).clamp(min=1)
            return kept.sum(positions, keepdim=True, dtype=wide) / count
        if mask is None:
            return x.amax(positions, keepdim=True).to(wide)
        highest = torch.where(mask, x, -torch.inf).amax(positions, keepdim=True).to(wide)
        return torch.where(mask.sum(positions, keepdim=True) > 0, highest, 0)

    def extra_repr(self) -> str:
        """The method, as `print(model)` shows it."""
        return self.method


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation block (section 3): x scaled by one learned gate per channel.

    z = squeeze(x) (eq. 2), s = gate(W2 δ(W1 z)) (eq. 3), y = s · x (eq. 4), where δ is
    `activation` and the paper's σ is `gate`. Adds 2·C·h weights and, with `bias`, C + h biases.

    Submodules `squeeze`, `fc1`, `activation`, `fc2` and `gate` may carry forward hooks; the
    output of `gate` is s with shape (N,C) (for `squeeze="none"` (N,*,C)).

    Args:
        channels: C, the channels of the input.
        reduction: r; the hidden width is floor(C / r) and never 0: C < r gives 1.
        hidden: the hidden width itself; takes the place of `reduction`.
        squeeze: "avg" (the paper's choice), "max" (table 11) or "none" (NoSqueeze, table 16).
        activation: makes δ, the activation between the two layers; nn.ReLU by default.
        gate: σ: "sigmoid" (the paper's choice), "tanh", "relu" (table 12), "hard_sigmoid",
            "identity_sigmoid" (2·sigmoid with a zero last layer: starts as the identity), or a
            module that maps (N,C) to gates of that shape.
        bias: whether both layers have biases; the released models do.
        dims: number of spatial dimensions of the input: 1, 2 or 3.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument out of range, or unknown `squeeze` or `gate`.
    """

    def __init__(
        self,
        channels: int,
        reduction: float = 16,
        *,
        hidden: int | None = None,
        squeeze: Squeeze = "avg",
        activation: Callable[[], nn.Module] = nn.ReLU,
        gate: GateName | nn.Module = "sigmoid",
        bias: bool = True,
        dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if reduction <= 0:
            raise ValueError(f"reduction must be positive, got {reduction}")
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        if squeeze not in SQUEEZES:
            raise ValueError(f"squeeze must be one of {', '.join(SQUEEZES)}, got {squeeze!r}")
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        if not isinstance(gate, nn.Module) and gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)} or a module, got {gate!r}")
        self.channels = channels
        self.hidden = hidden_width(channels, reduction) if hidden is None else hidden
        self.dims = dims
        self.gate_name = gate if isinstance(gate, str) else type(gate).__name__
        self.squeeze = GlobalSqueeze(squeeze)
        self.fc1 = nn.Linear(channels, self.hidden, bias, device=device, dtype=dtype)
        self.activation = activation()
        self.fc2 = nn.Linear(self.hidden, channels, bias, device=device, dtype=dtype)
        self.gate = gate if isinstance(gate, nn.Module) else GATES[gate]()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: PyTorch's own initialisation of nn.Linear for both layers.

        For the gate "identity_sigmoid" the last layer becomes zero, so that every gate is 1.
        """
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        if self.gate_name == "identity_sigmoid":
            nn.init.zeros_(self.fc2.weight)
            if self.fc2.bias is not None:
                nn.init.zeros_(self.fc2.bias)

    def excite(
        self, x: Float[Tensor, "n c *s"], mask: Bool[Tensor, "n 1 *s"] | None = None
    ) -> Float[Tensor, "n c *t"]:
        """Gates s (N,C,1,…) of x (N,C,*); (N,C,*) for `squeeze="none"`. Arguments as in forward."""
        if self.squeeze.method == "none":
            hidden = self.activation(self.fc1(x.movedim(1, -1).to(self.fc1.weight.dtype)))
            return self.gate(self.fc2(hidden)).movedim(-1, 1)
        z = self.squeeze(x, mask)
        with full_precision(x.device.type):
            # The mean of float16 values fits float16, so a model.half() loses nothing here.
            hidden = self.activation(self.fc1(z.flatten(1).to(self.fc1.weight.dtype)))
            return self.gate(self.fc2(hidden)).view(z.shape)

    def forward(
        self, x: Float[Tensor, "n c *s"], mask: Bool[Tensor, "n 1 *s"] | None = None
    ) -> Float[Tensor, "n c *s"]:
        """Scale x by its gates.

        Args:
            x: (N,C,*) with `dims` spatial dimensions of any size, any floating dtype.
            mask: (N,1,*), True where a position counts in the squeeze (padded speech, for
                instance); all positions are scaled. Anything but bool is compared with 0.

        Returns:
            (N,C,*), dtype and memory format of x.

        Raises:
            ValueError: another number of channels or dimensions, a mask of another shape, or a
                mask together with `squeeze="none"`.
        """
        if not torch.jit.is_tracing():  # a trace would take the comparisons for constants
            self._check(x, mask)
        if mask is None and not leaves_process(x) and fusable(self):
            return ops.squeeze_excite(x, *gate_parameters(self), self.gate_name)
        return x * self.excite(x, None if mask is None else mask != 0).to(x.dtype)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.ndim != self.dims + 2 or x.shape[1] != self.channels:
            wanted = ", ".join(("N", str(self.channels), *("L", "HW", "DHW")[self.dims - 1]))
            raise ValueError(f"x must have shape ({wanted}), got {tuple(x.shape)}")
        if mask is not None:
            if self.squeeze.method == "none":
                raise ValueError('mask has no effect with squeeze="none"; pass mask=None')
            if mask.shape != (x.shape[0], 1, *x.shape[2:]):
                wanted_mask = (x.shape[0], 1, *x.shape[2:])
                raise ValueError(f"mask must have shape {wanted_mask}, got {tuple(mask.shape)}")

    def extra_repr(self) -> str:
        """Channels and hidden width, as `print(model)` shows them."""
        return f"channels={self.channels}, hidden={self.hidden}"


def bn_relu(x: Float[Tensor, "n c *s"], bn: nn.Module) -> Float[Tensor, "n c *s"]:
    """ReLU of batch-normalised x, shape and dtype of x; fused as in `residual_tail`."""
    return residual_tail(x, None, bn)


def bn_relu_into(
    x: Float[Tensor, "n c *s"],
    bn: nn.Module,
    consumer: nn.Module,
    se: SqueezeExcitation | None = None,
) -> Tensor:
    """consumer(relu(SE(BN(x)))), without keeping the consumer's input for the backward pass.

    A convolution keeps its input for the gradient of its weights. Here it is computed again from
    x, which the batch norm keeps anyway: one more pass, one map less in memory. Only where the C++
    kernels run eagerly, and without SE.

    Args:
        x: (N,C,*).
        bn: batch norm.
        consumer: a convolution or pooling layer that takes (N,C,*).
        se: SE block in between, or None.

    Returns:
        The consumer's output.
    """
    y = residual_tail(x, None, bn, se)
    if torch.compiler.is_compiling():
        return consumer(y)
    with ops.recomputed(y):
        return consumer(y)


def residual_tail(
    x: Float[Tensor, "n c *s"],
    shortcut: Float[Tensor, "n c *s"] | None,
    bn: nn.Module,
    se: SqueezeExcitation | None = None,
    shortcut_bn: nn.Module | None = None,
) -> Float[Tensor, "n c *s"]:
    """The end of a residual block: relu(SE(BN(x)) + BN(shortcut)).

    Runs as one operator (`senet.ops.bn_se_add_relu`) where it can. It steps aside to the modules
    themselves, and says so once, for anything but plain batch norms and an SE block of the
    standard form, and where one of them carries hooks, which the fused operator would not call.
    It also does in a graph that leaves the process (torch.export, a trace), which then holds only
    PyTorch's own operators.

    Args:
        x: output of the branch's last convolution, (N,C,*).
        shortcut: what is added, (N,C,*); None adds nothing.
        bn: batch norm of the branch.
        se: the SE block; None for a plain network.
        shortcut_bn: batch norm of a projection shortcut; None leaves the shortcut as it is.

    Returns:
        (N,C,*), dtype of x.
    """
    if leaves_process(x) or not fusable(bn, se, shortcut_bn):
        out = bn(x)
        if se is not None:
            out = se(out)
        if shortcut is not None:
            out = out + (shortcut if shortcut_bn is None else shortcut_bn(shortcut))
        return F.relu(out, inplace=True)
    assert isinstance(bn, _BatchNorm)
    shortcut_norm = None
    if isinstance(shortcut_bn, _BatchNorm) and shortcut is not None:
        if own_statistics(bn) == own_statistics(shortcut_bn):
            shortcut, shortcut_norm = step_norm(shortcut_bn, shortcut)
        else:  # one of them is frozen
            shortcut = shortcut_bn(shortcut)
    x, norm = step_norm(bn, x)
    gate = (None,) * 4 if se is None else gate_parameters(se)
    return ops.bn_se_add_relu(
        x,
        shortcut,
        *norm[:4],
        *gate,
        training=own_statistics(bn),
        momentum=norm.momentum,
        eps=norm.eps,
        gate="sigmoid" if se is None else se.gate_name,
        shortcut_norm=shortcut_norm,
    )


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SyncBatchNorm)
_said: set[str] = set()


def leaves_process(x: object) -> bool:
    """Whether the operations are being recorded for use outside this process."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or not isinstance(x, Tensor)


def fusable(*modules: nn.Module | None) -> bool:
    """Whether the operator computes what these modules would; says once why it does not."""
    for module in modules:
        why_not = None if module is None else _obstacle(module)
        if why_not is not None:
            if not torch.compiler.is_compiling() and why_not not in _said:
                _said.add(why_not)
                warnings.warn(
                    f"senet runs {why_not} in separate passes, not in its fused operator",
                    stacklevel=3,
                )
            return False
    return True


def _obstacle(module: nn.Module) -> str | None:
    """Why a batch norm or an SE block cannot run in the fused operator, or None if it can."""
    if type(module) in _BATCH_NORMS:
        return hooked(module)
    if type(module) is not SqueezeExcitation:
        return f"{type(module).__name__}"
    if module.squeeze.method != "avg":
        return f"squeeze={module.squeeze.method!r}"
    if type(module.activation) is not nn.ReLU:
        return f"the activation {type(module.activation).__name__}"
    if module.gate_name not in GATES:
        return f"the gate {module.gate_name}"
    # Not children(), which takes as long as a small kernel.
    for child in module._modules.values():
        if type(child) not in _SE_CHILDREN:
            return f"an SE block with {type(child).__name__}"
        if child is not None and (why_not := hooked(child)):
            return why_not
    return hooked(module)


_SE_CHILDREN = (
    GlobalSqueeze,
    nn.Linear,
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardsigmoid,
    IdentitySigmoid,
)


def hooked(module: nn.Module) -> str | None:
    """Says which module has hooks, if this one has; None for none."""
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return f"modules with hooks ({type(module).__name__})" if hooks else None


def _batch_statistics(bn: _BatchNorm) -> bool:
    """Whether a batch norm normalises by the batch's own statistics."""
    return bn.training or bn.running_mean is None


def own_statistics(bn: _BatchNorm) -> bool:
    """Whether the operator shall take the statistics from the batch it is given."""
    return _batch_statistics(bn) and not (isinstance(bn, SyncBatchNorm) and bn.synchronises)


def step_norm(bn: _BatchNorm, x: Tensor) -> tuple[Tensor, ops.BatchNorm]:
    """x and what the operator needs of a batch norm; counts the batch, as its forward does."""
    if isinstance(bn, SyncBatchNorm) and bn.synchronises:
        return bn.synchronise(x)
    momentum = bn.momentum
    if bn.training and bn.track_running_stats:
        batches = bn.num_batches_tracked
        if batches is not None:
            batches.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / float(batches)
    tracked = not bn.training or bn.track_running_stats
    return x, ops.BatchNorm(
        bn.weight,
        bn.bias,
        bn.running_mean if tracked else None,
        bn.running_var if tracked else None,
        0.0 if momentum is None else momentum,
        bn.eps,
    )


def gate_parameters(
    se: SqueezeExcitation,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1, b1, w2, b2 as the operators take them."""
    fc1, fc2 = se.fc1, se.fc2
    return fc1.weight, fc1.bias, fc2.weight, fc2.bias
