"""Inputs for the tests of `senet::join`, and one function that runs any implementation."""

from dataclasses import dataclass, replace

import torch
from ops_cases import DEVICE, in_layout
from torch import Tensor

from senet import ops

CHANNELS = (21, 16, 5, 33)


@dataclass(frozen=True)
class Join:
    """Branches and sizes; kinds: of each branch b(atch), r(unning statistics) or n(o norm).

    joined: the activation of the branches of `bn_relu_concat_se`.

    A single branch with an activation is `bn_act_se`, everything else `bn_relu_concat_se`.
    """

    kinds: str = "bbnr"
    channels: tuple[int, ...] = CHANNELS
    N: int = 3
    spatial: tuple[int, ...] = (5, 7)
    hidden: int = 6
    gated: bool = True
    gate: str = "sigmoid"
    layout: str = "channels_last"
    dtype: torch.dtype = torch.float32
    affine: bool = True
    biases: bool = True
    activation: str = ""
    joined: str = "relu"
    hidden_activation: str = "relu"


def numbers(case: Join) -> dict[str, Tensor]:
    """Maps `x`0…, parameters of their norms, the gate's, and the gradient of y."""
    draw = torch.Generator("cpu").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")
        return values.to(DEVICE)

    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    C, h = sum(case.channels), case.hidden
    found: dict[str, Tensor] = {}
    for i, c in enumerate(case.channels):
        found[f"x{i}"] = 2 * normal(case.N, c, *case.spatial) + 0.5
        found |= {f"weight{i}": normal(c) + 1, f"bias{i}": normal(c)}
        found |= {f"mean{i}": normal(c), f"var{i}": normal(c).abs() + 0.5}
    found["y"] = normal(case.N, C, *case.spatial)
    found |= {"w1": normal(h, C) / C**0.5, "b1": normal(h)}
    found |= {"w2": normal(C, h) / h**0.5, "b2": normal(C)}
    for name, t in found.items():
        is_map = name[0] in "xy"
        found[name] = in_layout(t.to(case.dtype), case.layout) if is_map else t.to(exact)
    return found


def apply(t: dict[str, Tensor], case: Join) -> Tensor:
    """The operator on tensors named as in `numbers`."""
    norms = []
    for i, kind in enumerate(case.kinds):
        affine = (t[f"weight{i}"], t[f"bias{i}"]) if case.affine else (None, None)
        running = (t[f"mean{i}"], t[f"var{i}"])
        norms.append(None if kind == "n" else ops.BatchNorm(*affine, *running, 0.2, 1e-3))
    gate = [t["w1"], t["b1"] if case.biases else None, t["w2"], t["b2"] if case.biases else None]
    if case.activation:
        (norm,) = norms
        return ops.bn_act_se(
            t["x0"],
            *norm[:4],
            *(gate if case.gated else [None] * 4),
            training=case.kinds == "b",
            momentum=norm.momentum,
            eps=norm.eps,
            activation=case.activation,
            hidden_activation=case.hidden_activation,
            gate=case.gate,
        )
    return ops.bn_relu_concat_se(
        [t[f"x{i}"] for i in range(len(case.kinds))],
        norms,
        *(gate if case.gated else [None] * 4),
        training=[kind == "b" for kind in case.kinds],
        gate=case.gate,
        activation=case.joined,
    )


def run(
    implementation: str, case: Join, given: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """y, the running statistics afterwards, and all gradients that there are, named as the inputs.

    Those of the branches are put together: the error of one number alone says nothing.
    """
    given = numbers(case) if given is None else given
    t = {
        name: in_layout(value.detach().clone(), case.layout)
        if name[0] in "xy"
        else value.detach().clone()
        for name, value in given.items()
    }
    gradient = t.pop("y")
    for name, value in t.items():
        if name[:3] not in ("mea", "var"):
            value.requires_grad_()
    with ops.use(implementation):
        y = apply(t, case)
        y.backward(gradient.to(y.dtype))
    found = {name: value if name[:3] in ("mea", "var") else value.grad for name, value in t.items()}
    results = {"y": y.detach()}
    for name in ("x", "weight", "bias", "mean", "var"):  # of all branches
        values = [v for i in range(len(case.kinds)) if (v := found[f"{name}{i}"]) is not None]
        if values:
            results[name] = torch.cat(values, 1 if name == "x" else 0)
    for name in ("w1", "b1", "w2", "b2"):
        value = found[name]
        if value is not None:
            results[name] = value
    return results


def oracle(case: Join) -> dict[str, Tensor]:
    """The reference implementation on the same numbers in float64."""
    exact = {name: value.double() for name, value in numbers(case).items()}
    return run("reference", replace(case, dtype=torch.float64), exact)


def joins(**fixed: object) -> list[Join]:
    """Every kind of branch, with a gate and without."""
    kinds = ("bbnr", "bbbb", "nnnn", "rrnr")
    return [Join(**{"kinds": k, "gated": g, **fixed}) for k in kinds for g in (True, False)]
