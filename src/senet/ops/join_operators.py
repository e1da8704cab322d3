"""The operators `senet::join` and `senet::join_backward`, built as those of the tail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from senet.ops import cpu, join, join_cpu
from senet.ops.operators import LIBRARY, NO_DOUBLE_BACKWARD, differentiates, without_autocast

LIBRARY.define(
    "join(Tensor[] maps, Tensor?[] weights, Tensor?[] biases, Tensor?[] means,"
    " Tensor?[] variances, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, int[] normalizations,"
    " float[] eps, str gate)"
    " -> (Tensor y, Tensor statistics, Tensor squeezed, Tensor hidden, Tensor gates)"
)
LIBRARY.define(
    "join_backward(Tensor gradient, Tensor[] maps, Tensor? w1, Tensor? w2, Tensor statistics,"
    " Tensor squeezed, Tensor hidden, Tensor gates, int[] normalizations, str gate, bool[] wanted)"
    " -> Tensor[]"
)


def _join(maps: list[Tensor], *rest: Any) -> join.JoinOutput:
    kernels = maps[0].numel() > 0 and not cpu.unsupported(maps[0])
    return (join_cpu if kernels else join).join(maps, *rest)


def _join_backward(gradient: Tensor, maps: list[Tensor], *rest: Any) -> list[Tensor]:
    kernels = maps[0].numel() > 0 and not cpu.unsupported(maps[0])
    return (join_cpu if kernels else join).join_backward(gradient, maps, *rest)


def _join_fake(maps: list[Tensor], *rest: Any) -> join.JoinOutput:
    w1 = rest[4]
    return join.empty_join(maps, 0 if w1 is None else w1.shape[0])


def _join_backward_fake(gradient: Tensor, maps: list[Tensor], *rest: Any) -> list[Tensor]:
    del gradient
    hidden, wanted = rest[4], rest[8]
    return join.empty_join_gradients(maps, hidden.shape[1], wanted)


LIBRARY.impl("join", _join, "CompositeExplicitAutograd")
LIBRARY.impl("join_backward", _join_backward, "CompositeExplicitAutograd")
torch.library.register_fake("senet::join", _join_fake, lib=LIBRARY)
torch.library.register_fake("senet::join_backward", _join_backward_fake, lib=LIBRARY)

_OPERATOR = torch.ops.senet.join.default
_BACKWARD_OPERATOR = torch.ops.senet.join_backward.default


def _lists(count: int, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of `join` from its tensors one after the other: five of each branch, then four."""
    lists = [list(tensors[i * count : (i + 1) * count]) for i in range(5)]
    return (*lists, *tensors[5 * count :])


def _save(ctx: Any, options: tuple[Any, ...], tensors: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    count = len(options[0])
    ctx.options = options
    w1, _, w2, _ = tensors[5 * count :]
    ctx.save_for_backward(*tensors[:count], w1, w2, *output[1:])


def _gradients(ctx: Any, backward: Callable[..., list[Tensor]], gradient: Tensor | None) -> Any:
    """Gradients of the function's arguments for that of y, through a `join_backward`."""
    normalizations, _, gate = ctx.options
    count = len(normalizations)
    result: list[Tensor | None] = [None] * (3 + 5 * count + 4)
    # maps, weights, biases; then, behind means and variances, w1, b1, w2, b2
    places = [*range(3, 3 + 3 * count), *range(3 + 5 * count, len(result))]
    wanted = [ctx.needs_input_grad[i] for i in places]
    if gradient is not None and any(wanted):
        saved = ctx.saved_tensors
        maps, (w1, w2), small = saved[:count], saved[count : count + 2], saved[count + 2 :]
        found = iter(backward(gradient, list(maps), w1, w2, *small, normalizations, gate, wanted))
        for place, want in zip(places, wanted, strict=True):
            result[place] = next(found) if want else None
        for place, weight in ((-4, w1), (-2, w2)):  # fc weights may be 1x1 convolutions'
            flat = result[place]
            if flat is not None and weight.ndim > 2:
                result[place] = flat.reshape(weight.shape)
    return tuple(result)


class _Join(torch.autograd.Function):
    """`senet::join` and its gradient, on options and tensors one after the other."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        options, tensors = inputs[:3], inputs[3:]
        with torch._C._AutoDispatchBelowAutograd():
            output = _OPERATOR(*_lists(len(options[0]), tensors), *options)
        _save(ctx, options, tensors, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
        return _gradients(ctx, _BACKWARD_OPERATOR, gradient)


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *tensors: Any) -> Any:
        del ctx
        gradient, w1, w2, *rest = tensors
        small, maps = rest[:4], rest[4:]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_BACKWARD_OPERATOR(gradient, maps, w1, w2, *small, *options))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def _join_autograd(*inputs: Any) -> Any:
    options = inputs[9:]
    tensors = (*(t for group in inputs[:5] for t in group), *inputs[5:9])
    if differentiates(tensors):
        return _Join.apply(*options, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPERATOR(*inputs)


def _join_backward_autograd(gradient: Tensor, maps: list[Tensor], *rest: Any) -> Any:
    if differentiates((gradient, *maps, *rest[:6])):
        return list(_NoDoubleBackward.apply(rest[6:], gradient, *rest[:6], *maps))
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD_OPERATOR(gradient, maps, *rest)


LIBRARY.impl("join", _join_autograd, "Autograd")
LIBRARY.impl("join_backward", _join_backward_autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("join", without_autocast(_OPERATOR, _key), _key)
    LIBRARY.impl("join_backward", without_autocast(_BACKWARD_OPERATOR, _key), _key)


@register_flop_formula(torch.ops.senet.join)
def _join_flops(map_shapes: list[list[int]], *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Two matrix products with the squeezed map (2 flops a multiply-add, as PyTorch counts)."""
    del out_shape
    w1_shape = shapes[4]
    channels = sum(shape[1] for shape in map_shapes)
    return 0 if w1_shape is None else 2 * 2 * map_shapes[0][0] * channels * w1_shape[0]


@register_flop_formula(torch.ops.senet.join_backward)
def _join_backward_flops(_: list[int], map_shapes: Any, *rest: Any, **__: Any) -> int:
    """Each product has two gradients; those of unwanted weights are not computed."""
    w1_shape, wanted = rest[0], rest[8]
    if w1_shape is None:
        return 0
    product = 2 * map_shapes[0][0] * sum(shape[1] for shape in map_shapes) * w1_shape[0]
    through = any(wanted)
    return product * (2 * through + wanted[-4] + wanted[-2])


class AlgebraJoin(torch.autograd.Function):
    """`join.join` with its closed-form backward, transparent to torch.compile; as `_Join`."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Results of `senet::join`."""
        options, tensors = inputs[:3], inputs[3:]
        return join.join(*_lists(len(options[0]), tensors), *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: join.JoinOutput) -> None:
        """Keep what `backward` needs."""
        _save(ctx, inputs[:3], inputs[3:], output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
        """Gradients of all arguments for that of y."""
        return _gradients(ctx, join.join_backward, gradient)


def by_algebra(options: tuple[Any, ...], tensors: list[Tensor | None]) -> join.JoinOutput:
    """`join.join` with its gradient, as `operators.by_algebra`."""
    if torch.compiler.is_compiling() and not differentiates(tensors):
        return join.join(*_lists(len(options[0]), tuple(tensors)), *options)
    output: join.JoinOutput = AlgebraJoin.apply(*options, *tensors)
    return output
