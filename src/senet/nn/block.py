"""The SE block as a module, and when it runs in the fused operator.

Shape suffixes: N images, C channels, h hidden width, * spatial dimensions.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NoReturn, SupportsFloat, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from senet import ops
from senet.errors import UserError
from senet.nn.hooks import say_separate
from senet.nn.sync_bn import SyncBatchNorm
from senet.ops.maps import full_precision
from senet.support.shapes import Bool, Float

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
_GATE_NAMES = {made: name for name, made in GATES.items()}


def hidden_width(channels: int, reduction: float) -> int:
    """Width of the layer between the two fully connected ones: floor(C / r), at least 1.

    The released models round down and never to a multiple of 8 (the authors' Caffe definitions).
    """
    return max(1, int(channels / reduction))


@fx.wrap  # one node of a symbolic trace, which knows neither dimensions nor dtypes
def global_squeeze(x: Tensor, method: str, mask: Tensor | None = None) -> Tensor:
    """x (N,C,*) reduced to (N,C,1,…) in float32 at least, or as it is for "none".

    Args:
        x: (N,C,*).
        method: see `GlobalSqueeze`.
        mask: (N,1,*), True where a position counts.
    """
    if method == "none":
        return x
    positions = tuple(range(2, x.ndim))
    wide = torch.promote_types(x.dtype, torch.float32)
    if method == "avg":
        if mask is None:
            return x.mean(positions, keepdim=True, dtype=wide)
        kept = torch.where(mask, x, 0)  # not x·mask: padding may hold NaN
        count = mask.sum(positions, keepdim=True).clamp(min=1)
        return kept.sum(positions, keepdim=True, dtype=wide) / count
    if mask is None:
        return x.amax(positions, keepdim=True).to(wide)
    highest = torch.where(mask, x, -torch.inf).amax(positions, keepdim=True).to(wide)
    return torch.where(mask.sum(positions, keepdim=True) > 0, highest, 0)


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
        return global_squeeze(x, self.method, mask)

    def extra_repr(self) -> str:
        return self.method


def weight_dtype(layer: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype in which a layer wants its input; `otherwise` where it does not say.

    The layers of an SE block may have been replaced: by quantized ones, whose weight is no tensor,
    or by wrappers (LoRA), whose weights lie within.
    """
    dtype: torch.dtype | None = getattr(getattr(layer, "weight", None), "dtype", None)
    if dtype is None:
        dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), otherwise)
    quantized = isinstance(dtype, torch.dtype) and not dtype.is_floating_point
    return otherwise if quantized else dtype


class NotScriptable:
    """A module that torch.jit.script cannot compile, which says what can be used instead."""

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for first.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"torch.jit.script cannot compile senet's {type(self).__name__}: use "
            "torch.jit.trace(model.eval(), example_input), or senet.export for a file"
        )


class SqueezeExcitation(NotScriptable, nn.Module):
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
        if not isinstance(reduction, SupportsFloat) or not 0 < reduction < math.inf:  # nor NaN
            raise ValueError(f"reduction must be positive, got {reduction}")
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        if squeeze not in SQUEEZES:
            raise ValueError(f"squeeze must be one of {', '.join(SQUEEZES)}, got {squeeze!r}")
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        if not isinstance(gate, nn.Module) and not (isinstance(gate, str) and gate in GATES):
            raise ValueError(f"gate must be one of {', '.join(GATES)} or a module, got {gate!r}")
        self.channels = channels
        self.hidden = hidden_width(channels, reduction) if hidden is None else hidden
        self.dims = dims
        self.squeeze = GlobalSqueeze(squeeze)
        self.fc1 = nn.Linear(channels, self.hidden, bias, device=device, dtype=dtype)
        self.activation = activation()
        self.fc2 = nn.Linear(self.hidden, channels, bias, device=device, dtype=dtype)
        self.gate = gate if isinstance(gate, nn.Module) else GATES[gate]()
        self.reset_parameters()

    @property
    def gate_name(self) -> str:
        """Name of the gate that the block has now; of one that is none of ours, its class."""
        return _GATE_NAMES.get(type(self.gate), type(self.gate).__name__)

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
            hidden = self.activation(self.fc1(x.movedim(1, -1).to(weight_dtype(self.fc1, x.dtype))))
            return self.gate(self.fc2(hidden)).movedim(-1, 1)
        z = self.squeeze(x, mask)
        # A symbolic trace does not know the device; its graph has no autocast to leave either.
        with nullcontext() if _symbolic(x) else full_precision(x.device.type):
            # The mean of float16 values fits float16, so a model.half() loses nothing here.
            hidden = self.activation(self.fc1(z.flatten(1).to(weight_dtype(self.fc1, z.dtype))))
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
        if not torch.jit.is_tracing() and not _symbolic(x):
            self._check(x, mask)  # a trace would take the comparisons for constants
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
        return f"channels={self.channels}, hidden={self.hidden}"


def _symbolic(x: object) -> bool:
    """Whether x stands for a tensor in a symbolic trace of torch.fx."""
    return isinstance(x, fx.Proxy)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SyncBatchNorm)


def leaves_process(x: object) -> bool:
    """Whether the operations are being recorded for use outside this process."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or not isinstance(x, Tensor)


def fusable(*modules: nn.Module | None) -> bool:
    """Whether the operator computes what these modules would; says once why it does not."""
    everywhere = _global_hooks()
    for module in modules:
        why_not = None if module is None else everywhere or _obstacle(module)
        if why_not is not None:
            say_separate(why_not, stacklevel=3)
            return False
    return True


def _obstacle(module: nn.Module) -> str | None:
    """Why a batch norm or an SE block cannot run in the fused operator, or None if it can."""
    if type(module) in _BATCH_NORMS:
        return _own_hooks(module)
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
        if child is not None and (why_not := _own_hooks(child)):
            return why_not
    return _own_hooks(module)


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
    """Says which module has hooks, if this one has, or whether all have; None for none."""
    return _own_hooks(module) or _global_hooks()


def _global_hooks() -> str | None:
    """Says whether PyTorch calls hooks of every module; a compiler looks after them itself."""
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return "modules with global hooks"
    return None


def _own_hooks(module: nn.Module) -> str | None:
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return f"modules with hooks ({type(module).__name__})" if hooks else None


def gate_parameters(
    se: SqueezeExcitation,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1, b1, w2, b2 as the operators take them."""
    fc1, fc2 = se.fc1, se.fc2
    return fc1.weight, fc1.bias, fc2.weight, fc2.bias
