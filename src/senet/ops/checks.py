"""What the operators refuse, said before work starts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from senet.errors import UserError
from senet.ops.activations import Activation
from senet.ops.reference import BRANCH_ACTIVATIONS, GATES, HIDDEN_ACTIVATIONS, BatchNorm

_TENSORS = BatchNorm._fields[:4]
GateParameters = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def check_gate(
    C: int, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, gate: str
) -> None:
    """Raise unless the gate's weights fit C channels: w1 (h,C), b1 (h,), w2 (C,h), b2 (C,)."""
    if gate not in GATES:
        raise UserError(f"gate is {gate!r}; choose one of {', '.join(GATES)}")
    if w1 is None or w2 is None:
        if not (w1 is None and b1 is None and w2 is None and b2 is None):
            raise UserError("w1, b1, w2, b2: give both weights, or None for all four (no gate)")
        return
    h = w1.shape[0]
    expected = {"w1": (w1, h * C), "b1": (b1, h), "w2": (w2, C * h), "b2": (b2, C)}
    for name, (t, size) in expected.items():
        if t is not None and t.numel() != size:
            raise UserError(
                f"{name} has shape {tuple(t.shape)}; for an input of {C} channels and a hidden "
                f"width of {h} it needs {size} numbers (w1 (h,C), b1 (h,), w2 (C,h), b2 (C,))"
            )
    if w1.shape[1] != C or w2.shape[0] != C:
        raise UserError(
            f"w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)} do not fit {C} channels: "
            "they are (h,C) and (C,h)"
        )


def check_activations(activation: Activation, hidden_activation: str) -> None:
    """Raise unless the operators know both activations."""
    if activation.name not in BRANCH_ACTIVATIONS:
        known = ", ".join(BRANCH_ACTIVATIONS)
        raise UserError(f"activation is {activation.name!r}; choose one of {known}")
    if hidden_activation not in HIDDEN_ACTIVATIONS:
        known = ", ".join(HIDDEN_ACTIVATIONS)
        raise UserError(f"hidden_activation is {hidden_activation!r}; choose one of {known}")


def check_norm(name: str, x: Tensor, norm: BatchNorm) -> None:
    """Raise unless the tensors of a normalization, called `name` in messages, fit x."""
    C = x.shape[1]
    for field, t in zip(_TENSORS, norm[:4], strict=True):
        if t is not None and t.shape != (C,):
            raise UserError(f"{name}{field} has shape {tuple(t.shape)}; the input needs ({C},)")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise UserError(f"{name}running_mean and running_var: give both or neither")


def check_norms(
    x: Tensor,
    shortcut: Tensor | None,
    norm: BatchNorm,
    shortcut_norm: BatchNorm | None,
    batch: bool,
    training: bool,
) -> None:
    """Raise unless the normalizations fit the maps and each other; `batch`: x uses its own sums."""
    check_norm("", x, norm)
    if shortcut_norm is not None:
        if shortcut is None:
            raise UserError("shortcut_norm is given without a shortcut")
        check_norm("shortcut_norm.", x, shortcut_norm)
        if batch != (training or shortcut_norm.running_mean is None):
            raise UserError("running statistics: give them to both normalizations or to neither")
    if batch:
        check_batch(x)


def check_maps(x: Tensor, shortcut: Tensor | None) -> None:
    """Raise unless x is a floating (N,C,*) and the shortcut as large."""
    if x.ndim < 3:
        raise UserError(f"x has shape {tuple(x.shape)}; it must be (N, C, *spatial)")
    if not x.is_floating_point():
        raise UserError(f"x is {x.dtype}; it must be a floating type")
    if shortcut is not None and shortcut.shape != x.shape:
        raise UserError(
            f"shortcut has shape {tuple(shortcut.shape)}, x {tuple(x.shape)}; they must be equal"
        )


def check_batch(x: Tensor) -> None:
    """Raise where x has no statistics of its own: one value a channel."""
    if x.shape[1] and x.numel() // x.shape[1] == 1:  # nn.BatchNorm2d's words
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


def check_join(
    maps: Sequence[Tensor],
    norms: Sequence[BatchNorm | None],
    training: Sequence[bool],
    gate_parameters: GateParameters,
    gate: str,
) -> None:
    """Raise unless the arguments of `bn_relu_concat_se` fit each other."""
    if not maps or not len(maps) == len(norms) == len(training):
        raise UserError(
            f"maps, norms, training have {len(maps)}, {len(norms)}, {len(training)} entries; "
            "give one of each for every map, and at least one"
        )
    for i, (x, norm, own) in enumerate(zip(maps, norms, training, strict=True)):
        check_maps(x, None)
        if (x.shape[0], *x.shape[2:]) != (maps[0].shape[0], *maps[0].shape[2:]):
            raise UserError(
                f"maps[{i}] has shape {tuple(x.shape)}, maps[0] {tuple(maps[0].shape)}; they may "
                "differ in their channels only"
            )
        if norm is not None:
            check_norm(f"norms[{i}].", x, norm)
            if own or norm.running_mean is None:
                check_batch(x)
    check_gate(sum(x.shape[1] for x in maps), *gate_parameters, gate)


def check_depthwise(x: Tensor, weight: Tensor, stride: int, padding: int) -> None:
    """Raise unless the arguments of `depthwise` fit each other."""
    if x.ndim != 4:
        raise UserError(f"x has shape {tuple(x.shape)}; it must be (N, C, H, W)")
    C, k = x.shape[1], weight.shape[-1]
    if weight.shape != (C, 1, k, k):
        raise UserError(
            f"weight has shape {tuple(weight.shape)}; for an input of {C} channels it must be "
            f"({C}, 1, k, k)"
        )
    if stride < 1 or padding < 0:
        raise UserError(f"stride is {stride}, padding {padding}; they are at least 1 and 0")
    if min(x.shape[2:]) + 2 * padding < k:
        raise UserError(
            f"a kernel of {k} is larger than the input, {tuple(x.shape[2:])} with a padding of "
            f"{padding}"
        )
