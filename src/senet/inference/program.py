"""A lowered network for one input shape, ready to run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from senet.inference import kernels
from senet.inference.buffers import place
from senet.inference.lowering import lower
from senet.inference.outputs import rebuilt
from senet.inference.shapes import outline
from senet.inference.steps import Constants, NativeStep, TorchStep
from senet.inference.workspaces import Workspace
from senet.kernels.structs import Kind, Step

# Floats from the arena to the scratch memory behind it, and a bound of a Python object's bytes.
_LINE = 16
_OBJECT_BYTES = 1024


@dataclass(frozen=True)
class Stretch:
    """Kernel steps that run in one call.

    Attributes:
        steps: the steps; those of a program hold positions where those of a run hold addresses.
        positions: which words of the steps are such positions.
        inputs: the steps that read the network's input, one for each group of images.
    """

    steps: ctypes.Array[Step]
    positions: NDArray[np.intp]
    inputs: tuple[Step, ...]

    def at(self, address: int) -> Stretch:
        """A copy of it for an arena at that address."""
        words = np.frombuffer(memoryview(self.steps).cast("B"), np.int64).copy()
        words[self.positions] += address
        return _stretch((Step * len(self.steps)).from_buffer(words.data), self.positions)


def _stretch(steps: ctypes.Array[Step], positions: NDArray[np.intp]) -> Stretch:
    # Others of this kind read maps, and know their strides beforehand.
    inputs = tuple(s for s in steps if s.kind == Kind.INPUT and not any(s.strides))
    return Stretch(steps, positions, inputs)


class Program:
    """The network for one shape: its steps, and where in a workspace they find their maps.

    It does not change when it runs: any number of runs may go on at the same time, each in a
    workspace of its own.

    Args:
        module: the rewritten graph; it is only read.
        x: an input of the shape.
        threads: threads of the kernels.
        constants: packed weights shared with the network's other programs.
        empty: the `outline` of the graph; None makes one.

    Attributes:
        parts: stretches of kernel steps, and between them nodes that PyTorch runs.
        size: floats of the workspace that a run needs.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        x: Tensor,
        threads: int,
        constants: Constants,
        empty: nn.Module | None = None,
    ) -> None:
        lowering = lower(module, x, threads, constants, outline(module) if empty is None else empty)
        self.module, self.threads = module, threads
        self.output, self.escaping = lowering.output, lowering.escaping
        self.images = lowering.input_images
        self.fixed = lowering.fixed
        self.maps = {n: (m, lowering.traced[n].ndim) for n, m in lowering.places.values.items()}
        builder = lowering.builder
        self.arena = place(list(builder.buffers.values())) + kernels.SLACK
        self.arena += -self.arena % _LINE
        share = builder.scratch + kernels.SLACK + kernels.STEP_FLOATS * (len(builder.steps) + _LINE)
        self.scratch = threads * (share + -share % _LINE)
        self.size = self.arena + self.scratch
        self.kept: list[Tensor] = []
        self.parts: list[Stretch | TorchStep] = []
        pending: list[NativeStep] = []
        for step in builder.steps:
            if isinstance(step, NativeStep):
                pending.append(step)
                continue
            self._close(pending)
            pending = []
            self.parts.append(step)
        self._close(pending)

    @property
    def bytes(self) -> int:
        """Memory that it takes beside the packed weights and the workspaces."""
        stretches = [part for part in self.parts if isinstance(part, Stretch)]
        words = sum(ctypes.sizeof(part.steps) + part.positions.nbytes for part in stretches)
        return words + _OBJECT_BYTES * (len(self.parts) + len(self.maps))

    def _close(self, pending: list[NativeStep]) -> None:
        if not pending:
            return
        steps = (Step * len(pending))()
        size, positions = ctypes.sizeof(Step), []
        for number, (step, done) in enumerate(zip(pending, steps, strict=True)):
            for name, value in step.fields.items():
                setattr(done, name, value)
            if step.strides is not None:
                done.strides[:] = step.strides
            for name, where in step.maps.items():
                setattr(done, name, 4 * where.offset)
                positions.append((number * size + getattr(Step, name).offset) // 8)
            for name, tensor in step.constants.items():
                self.kept.append(tensor)
                setattr(done, name, tensor.data_ptr())
        self.parts.append(_stretch(steps, np.array(positions, np.intp)))

    def profile(self, x: Tensor, clock: Callable[[], float]) -> dict[fx.Node | None, float]:
        """Seconds of each node that PyTorch runs, and under None those of the kernels."""
        seconds: dict[fx.Node | None, float] = {None: 0.0}
        last = 0.0

        def note(part: Stretch | TorchStep) -> None:
            nonlocal last
            key = part.node if isinstance(part, TorchStep) else None
            last, before = clock(), last
            seconds[key] = seconds.get(key, 0.0) + last - before

        workspace = Workspace(self.size)
        self.run(x, workspace)
        last = clock()
        self.run(x, workspace, note)
        return seconds

    def run(
        self,
        x: Tensor,
        workspace: Workspace | None = None,
        after: Callable[[Stretch | TorchStep], None] | None = None,
    ) -> Any:
        """The network's output for x, which has the program's shape.

        Args:
            x: the input.
            workspace: memory for this run alone; None allocates some.
            after: called after each part with it.
        """
        workspace = Workspace(self.size) if workspace is None else workspace
        memory = workspace.memory
        if workspace.prepared_for is not self:
            address = memory.data_ptr()
            workspace.parts = [p.at(address) if isinstance(p, Stretch) else p for p in self.parts]
            workspace.prepared_for = self
        scratch = memory[self.arena : self.size]
        run = _Run(self, memory, dict(self.fixed))
        group, strides = 0, x.stride() if x.ndim == 4 else (*x.stride()[:2], *x.stride()[1:])
        for part in workspace.parts:
            if isinstance(part, Stretch):
                for step in part.inputs:
                    step.x = x.data_ptr() + 4 * group * self.images * x.stride(0)
                    step.strides[:] = strides
                    group += 1
                kernels.run(part.steps, self.threads, scratch)
            else:
                run.in_torch(part)
            if after is not None:
                after(part)
        return rebuilt(self.output, run.result)


def _method(name: str, args: tuple[Any, ...]) -> str:
    """A method that does the same for maps in memory: they are channels_last, with few views."""
    if name == "view" and not any(isinstance(arg, torch.dtype) for arg in args):
        return "reshape"
    return "reshape_as" if name == "view_as" else name


@dataclass(frozen=True)
class _Run:
    """One run of a program: its memory, and what PyTorch has computed in it."""

    program: Program
    memory: Tensor
    env: dict[fx.Node, Any]

    def value(self, node: fx.Node) -> Any:
        """What a node gave, as long as it lies in memory."""
        if node in self.env:
            return self.env[node]
        where, dims = self.program.maps[node]
        return where.tensor(self.memory, dims)

    def result(self, node: fx.Node) -> Any:
        """What a node gave, to keep."""
        value = self.value(node)
        return (
            value.clone(memory_format=torch.contiguous_format)
            if isinstance(value, Tensor)
            else value
        )

    def in_torch(self, step: TorchStep) -> None:
        """Let PyTorch run a node."""
        node, module = step.node, self.program.module
        # A container that is returned must not hold views of the memory.
        get = self.result if node in self.program.escaping else self.value
        args, kwargs = rebuilt(node.args, get), rebuilt(node.kwargs, get)
        match node.op:
            case "call_module":
                result: Any = module.get_submodule(str(node.target))(*args, **kwargs)
            case "call_method":
                result = getattr(args[0], _method(str(node.target), args))(*args[1:], **kwargs)
            case _:
                assert callable(node.target)
                result = node.target(*args, **kwargs)
        if step.target is None:
            self.env[node] = result
        else:
            step.target.tensor(self.memory, result.ndim).copy_(result)
