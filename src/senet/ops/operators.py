"""The operators `senet::tail` and `senet::tail_backward` and their gradients.

Schema, kernels, fake tensors, autograd, autocast and flops. They are opaque to torch.compile and
torch.export: one node that calls the C++ or the Triton kernels where these can take the tensors,
and the formulas of `senet.ops.algebra` everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from senet.ops import algebra, cpu, triton

LIBRARY = torch.library.Library("senet", "DEF")
LIBRARY.define(
    "tail(Tensor x, Tensor? shortcut, Tensor? weight, Tensor? bias, Tensor? running_mean,"
    " Tensor? running_var, Tensor? shortcut_weight, Tensor? shortcut_bias, Tensor? shortcut_mean,"
    " Tensor? shortcut_var, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, str normalization,"
    " bool normalize_shortcut, float eps, float shortcut_eps, str gate, bool relu)"
    " -> (Tensor y, Tensor statistics, Tensor squeezed, Tensor hidden, Tensor gates)"
)
LIBRARY.define(
    "tail_backward(Tensor gradient, Tensor x, Tensor? y, Tensor? shortcut, Tensor? weight,"
    " Tensor? bias, Tensor? shortcut_weight, Tensor? shortcut_bias, Tensor? w1, Tensor? w2,"
    " Tensor statistics, Tensor squeezed, Tensor hidden, Tensor gates, str normalization,"
    " bool normalize_shortcut, str gate, bool relu, bool[] wanted) -> Tensor[]"
)

# Positions of the inputs of `tail` that can have a gradient, in the order of algebra.GRADIENTS.
_DIFFERENTIABLE = (0, 1, 2, 3, 6, 7, 10, 11, 12, 13)
_INPUTS = 20

NO_DOUBLE_BACKWARD = (
    "senet.ops has no double backward in its fast implementations; wrap the model's forward pass "
    'in `with senet.ops.use("reference"):`'
)


def _tail(x: Tensor, *rest: Any) -> algebra.TailOutput:
    if triton.takes(x):
        return triton.tail(x, *rest)
    if x.numel() > 0 and not cpu.unsupported(x):
        return cpu.tail(x, *rest)
    return algebra.tail(x, *rest)


def _tail_backward(gradient: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    if triton.takes(x):
        return triton.tail_backward(gradient, x, *rest)
    if x.numel() > 0 and not cpu.unsupported(x):
        return cpu.tail_backward(gradient, x, *rest)
    return algebra.tail_backward(gradient, x, *rest)


LIBRARY.impl("tail", _tail, "CompositeExplicitAutograd")
LIBRARY.impl("tail_backward", _tail_backward, "CompositeExplicitAutograd")
LIBRARY.impl("tail", _tail, "CUDA")  # also what ROCm tensors dispatch to
LIBRARY.impl("tail_backward", _tail_backward, "CUDA")


def _tail_fake(x: Tensor, *rest: Any) -> algebra.TailOutput:
    w1, normalization, normalize_shortcut = rest[9], rest[13], rest[14]
    rows = algebra.statistics_rows(normalization, normalize_shortcut)
    return algebra.empty_outputs(algebra.dense(x), rows, 0 if w1 is None else w1.shape[0])


def _tail_backward_fake(gradient: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    hidden, wanted = rest[10], rest[16]
    return algebra.empty_gradients(algebra.dense(x), hidden.shape[1], wanted)


torch.library.register_fake("senet::tail", _tail_fake, lib=LIBRARY)
torch.library.register_fake("senet::tail_backward", _tail_backward_fake, lib=LIBRARY)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: algebra.TailOutput) -> None:
    """Keep what the backward pass needs of `tail`'s inputs and results."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, output[0], output[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], y: Tensor, small: tuple[Tensor | None, ...]) -> None:
    """Keep x, and y or the shortcut for the relu's mask; everything else kept is of (N,C) size."""
    (x, shortcut, weight, bias, _, _, shortcut_weight, shortcut_bias, _, _) = inputs[:10]
    (w1, _, w2, _, normalization, normalize_shortcut, _, _, gate, relu) = inputs[10:20]
    plain_shortcut = shortcut is not None and not normalize_shortcut
    ctx.save_for_backward(
        x,
        y if relu and plain_shortcut else None,
        shortcut if normalize_shortcut else None,
        weight,
        bias,
        shortcut_weight,
        shortcut_bias,
        w1,
        w2,
        *small,
    )
    ctx.options = (normalization, normalize_shortcut, gate, relu)
    # without a relu the gradient of a plain shortcut is that of y itself: nothing to compute
    ctx.passes_through = plain_shortcut and not relu


def gradients(
    ctx: Any, backward: Callable[..., list[Tensor]], gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `tail` for that of y, through `backward` (a `tail_backward`)."""
    result: list[Tensor | None] = [None] * _INPUTS
    if gradient is None:
        return tuple(result)
    wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if ctx.passes_through and wanted[1]:
        wanted[1] = False
        result[1] = gradient
    if any(wanted):
        saved = ctx.saved_tensors
        found = backward(gradient, *saved, *ctx.options, wanted)
        positions = [i for i, want in zip(_DIFFERENTIABLE, wanted, strict=True) if want]
        for i, value in zip(positions, found, strict=True):
            result[i] = value
        for i, weight in ((10, saved[7]), (12, saved[8])):  # fc weights may be 1x1 convolutions'
            flat = result[i]
            if flat is not None and weight.ndim > 2:
                result[i] = flat.reshape(weight.shape)
    return tuple(result)


class _Tail(torch.autograd.Function):
    """`senet::tail` and its gradient; torch.library.register_autograd costs 0.1 ms more a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = _OPERATOR(*inputs)
        save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
        return gradients(ctx, _BACKWARD_OPERATOR, gradient)


class _TailBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        del ctx
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_BACKWARD_OPERATOR(*inputs))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def differentiates(inputs: Sequence[Any]) -> bool:
    """Whether a gradient of these arguments will be wanted."""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in inputs
    )


def _tail_autograd(*inputs: Any) -> Any:
    if differentiates(inputs):
        return _Tail.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPERATOR(*inputs)


def _tail_backward_autograd(*inputs: Any) -> Any:
    if differentiates(inputs):
        return list(_TailBackward.apply(*inputs))
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD_OPERATOR(*inputs)


_OPERATOR = torch.ops.senet.tail.default
_BACKWARD_OPERATOR = torch.ops.senet.tail_backward.default
LIBRARY.impl("tail", _tail_autograd, "Autograd")
LIBRARY.impl("tail_backward", _tail_backward_autograd, "Autograd")


def without_autocast(operator: Any, key: str) -> Callable[..., Any]:
    """Inputs keep their types under autocast: sums and the gate are in float32 whatever x is."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*arguments)

    return call


for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("tail", without_autocast(_OPERATOR, _key), _key)
    LIBRARY.impl("tail_backward", without_autocast(_BACKWARD_OPERATOR, _key), _key)


@register_flop_formula(torch.ops.senet.tail)
def _tail_flops(x_shape: list[int], *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Two matrix products with the squeezed map (2 flops a multiply-add, as PyTorch counts)."""
    del out_shape
    w1_shape = shapes[9]
    return 0 if w1_shape is None else 2 * 2 * x_shape[0] * x_shape[1] * w1_shape[0]


@register_flop_formula(torch.ops.senet.tail_backward)
def _tail_backward_flops(_: list[int], x_shape: list[int], *rest: Any, **__: Any) -> int:
    """Each product has two gradients; those of unwanted weights are not computed."""
    w1_shape, wanted = rest[6], rest[16]
    if w1_shape is None:
        return 0
    product = 2 * x_shape[0] * x_shape[1] * w1_shape[0]
    through = any(wanted[i] for i in (0, 2, 3, 6, 7, 8, 9))
    return product * (2 * through + wanted[6] + wanted[8])


class DirectTail(torch.autograd.Function):
    """The C++ or Triton kernels without the dispatcher, for eager calls that nobody observes.

    Takes the arguments of `senet::tail` and the momenta of both normalizations (None leaves their
    running statistics as they are), and returns y alone.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """y of `senet::tail`."""
        ctx.backward_kernels = cpu.tail_backward
        if triton.takes(inputs[0]):
            ctx.backward_kernels = triton.tail_backward
            momentum, shortcut_momentum = inputs[_INPUTS:]
            momenta = {"momentum": momentum, "shortcut_momentum": shortcut_momentum}
            y, *kept = triton.tail(*inputs[:_INPUTS], **momenta)
            _save(ctx, inputs, y, tuple(kept))
            return y
        y, small = cpu.tail_packed(inputs[0], inputs[1:_INPUTS], *inputs[_INPUTS:])
        _save(ctx, inputs, y, (small, None, None, None))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of all arguments for that of y."""
        return (*gradients(ctx, ctx.backward_kernels, gradient), None, None)


class _Again:
    """y = relu(norm(x)) of a `DirectTail` without gate and shortcut, to be computed once more.

    Keeps what the operator's own backward pass keeps anyway. PyTorch refuses that pass when one of
    these tensors has been changed in between, so a wrong y cannot go unnoticed.
    """

    def __init__(self, saved: tuple[Tensor, ...]) -> None:
        x, weight, bias, self.statistics = saved[0], saved[3], saved[4], saved[9]
        self.x, self.weight, self.bias = x.detach(), weight, bias

    def __call__(self) -> Tensor:
        return cpu.relu_of_normalized(self.x, self.weight, self.bias, self.statistics)


def recomputed(y: Tensor) -> AbstractContextManager[Any]:
    """Operations in this context that would keep y for their backward pass compute it again there.

    Costs one pass (y from x) and saves the map. For y from the C++ kernels' BN → ReLU; for any
    other one, and where somebody else already decides what is kept (torch.utils.checkpoint,
    torch.autograd.graph.save_on_cpu), nothing changes.
    """
    node: Any = y.grad_fn
    autograd: Any = torch._C._autograd
    is_tail = isinstance(node, DirectTail._backward_cls)
    if (
        not is_tail
        or not autograd._saved_tensors_hooks_is_enabled()
        or autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return nullcontext()
    saved = node.saved_tensors
    _, _, _, relu = node.options
    if not relu or saved[1] is not None or saved[2] is not None or saved[7] is not None:
        return nullcontext()
    again, address, shape = _Again(saved), y.data_ptr(), y.shape

    def pack(t: Tensor) -> Tensor | _Again:
        return again if t.data_ptr() == address and t.shape == shape else t

    def unpack(kept: Tensor | _Again) -> Tensor:
        return kept() if isinstance(kept, _Again) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def is_unobserved(inputs: tuple[Any, ...]) -> bool:
    """Whether nothing has to see `senet::tail`: no tracing, dispatch mode or subclass."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
        and _PLAIN.issuperset(map(type, inputs[:14]))
        and inputs[0].numel() > 0
    )


class AlgebraTail(torch.autograd.Function):
    """`algebra.tail` with its closed-form backward, transparent to torch.compile."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Arguments and results of `senet::tail`."""
        return algebra.tail(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: algebra.TailOutput) -> None:
        """Keep what `backward` needs."""
        save_for_backward(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
        """Gradients of all arguments for that of y."""
        return gradients(ctx, algebra.tail_backward, gradient)


def by_algebra(arguments: tuple[Any, ...]) -> algebra.TailOutput:
    """`algebra.tail` with its gradient; torch.compile cannot trace the function without one."""
    if torch.compiler.is_compiling() and not differentiates(arguments):
        return algebra.tail(*arguments)
    output: algebra.TailOutput = AlgebraTail.apply(*arguments)
    return output
