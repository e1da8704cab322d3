"""Compile every launch of the operator's Triton kernels for GPUs that are not there.

Run as a program, without TRITON_INTERPRET: the kernels are replaced by recorders, the operator is
called on CPU tensors (whose numbers mean nothing), and each recorded launch is compiled by Triton's
own compiler down to machine code.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from join_cases import Join, numbers
from ops_cases import Case, inputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from senet.ops import join
from senet.ops.tail import TAIL, Arguments, Gradients
from senet.ops.triton import gate, kernels
from senet.ops.triton import join as joins
from senet.ops.triton import tail as ours

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
Launch = tuple[JITFunction, dict[str, str], dict[str, Any]]


class Recorder:
    """Stands for a kernel and keeps what each launch would compile."""

    def __init__(self, kernel: JITFunction, launches: dict[str, Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 0 < grid[0] < 2**31

        def launch(*arguments: Any, **options: Any) -> None:
            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
            assert values.keys() == set(self.kernel.arg_names)
            signature, constants = {}, {}
            for parameter in self.kernel.params:
                value = values[parameter.name]
                if isinstance(value, torch.Tensor):
                    signature[parameter.name] = TYPES[value.dtype]
                elif parameter.is_constexpr or value is None or value == 1:
                    signature[parameter.name] = "constexpr"
                    constants[parameter.name] = value
                else:
                    signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            key = f"{self.kernel.__name__} {sorted(signature.items())} {constants}"
            self.launches[key] = (self.kernel, signature, constants)

        return launch


def record_joins(cases: list[Join]) -> None:
    """Launches of BN → activation → SE."""
    for case in cases:
        t = numbers(case)
        arguments = join.Arguments(
            [t["x0"]],
            *([t[name]] for name in ("weight0", "bias0", "mean0", "var0")),
            *(t[name] for name in ("w1", "b1", "w2", "b2")),
            normalizations=[join.BATCH if case.kinds == "b" else join.RUNNING],
            eps=[1e-5],
            activation=case.activation,
            negative_slope=0.01,
            hidden_activation=case.hidden_activation,
            gate=case.gate,
        )
        outputs = joins.forward(arguments, (0.1,))
        one = [True]
        wanted = join.Gradients(one, one, one, True, True, True, True)
        joins.backward(t["y"], join.JOIN.save(arguments, outputs), wanted)


def record(cases: list[Case], joined: list[Join]) -> dict[str, Launch]:
    launches: dict[str, Launch] = {}
    for module in (kernels, gate):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                setattr(module, name, Recorder(kernel, launches))
    for case in cases:
        t = inputs(case)
        normalized = case.shortcut == "normalized"
        other = ("weight", "bias", "mean", "var")
        arguments = Arguments(
            x=t["x"],
            shortcut=None if case.shortcut == "none" else t["shortcut"],
            **{name: t[name] for name in ("weight", "bias", "running_mean", "running_var")},
            **{f"shortcut_{name}": t[f"shortcut_{name}"] for name in other if normalized},
            **{name: t[name] for name in ("w1", "b1", "w2", "b2") if case.gated},
            normalization="batch" if case.training else "running",
            normalize_shortcut=normalized,
            eps=1e-5,
            shortcut_eps=1e-3,
            gate=case.gate,
            relu=case.relu and case.activation == "relu",
            activation="linear" if case.activation == "relu" else case.activation,
        )
        outputs = ours.forward(arguments, (0.1, 0.1) if case.training else (None, None))
        given = [name for name in Gradients._fields if getattr(arguments, name) is not None]
        for wanted in (given, ["x"], ["shortcut"] if normalized else []):
            flags = Gradients(*(name in wanted for name in Gradients._fields))
            ours.backward(t["gradient"], TAIL.save(arguments, outputs), flags)
    record_joins(joined)
    return launches


def main() -> None:
    """Print each compiled launch: kernel, target, bytes of machine code."""
    first = "--first" in sys.argv  # of each kernel's signatures
    targets = [name for name in sys.argv[1:] if name != "--first"] or list(TARGETS)
    sizes = {"N": 4, "C": 256, "spatial": (56, 56), "hidden": 16}
    cases = [
        Case(dtype=torch.bfloat16, shortcut="plain", **sizes),
        Case(dtype=torch.float32, shortcut="normalized", layout="contiguous", gate="tanh", **sizes),
        Case(dtype=torch.bfloat16, shortcut="plain", activation="silu", **sizes),
        Case(dtype=torch.float32, shortcut="normalized", activation="hardswish", **sizes),
        Case(dtype=torch.float64, N=3, C=21, shortcut="none", gate="hard_sigmoid", training=False),
    ]
    acts = [("silu", "silu"), ("hardswish", "relu"), ("gelu", "hardswish"), ("leaky_relu", "silu")]
    one = {"channels": (256,), "N": 4, "spatial": (28, 28), "hidden": 16}
    joined = [
        Join(kinds="b", activation=a, hidden_activation=h, dtype=dtype, **one)
        for (a, h), dtype in zip(
            acts, (torch.bfloat16, torch.float32, torch.float64, torch.float16), strict=True
        )
    ]
    launches = list(record(cases, joined).values())
    if first:
        launches = list({launch[0].__name__: launch for launch in reversed(launches)}.values())
    for target in targets:
        for kernel, signature, constants in launches:
            name = f"{kernel.__name__} {target}"
            source = ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": 4})
            binary = compiled.asm.get("cubin") or compiled.asm.get("hsaco")
            print(name, len(binary), flush=True)


if __name__ == "__main__":
    main()
