"""A lowered network for one input shape, ready to run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from senet.inference import kernels
from senet.inference.buffers import place
from senet.inference.builder import Constants, NativeStep, TorchStep
from senet.inference.lowering import lower
from senet.kernels.structs import Kind, Step


@dataclass
class _Stretch:
    """Kernel steps that run in one call."""

    steps: Any


class Program:
    """The network for one shape: its steps, and the buffers that every run uses again.

    One run at a time: a lock makes further threads wait.

    Args:
        module: the rewritten graph.
        x: an input of the shape.
        threads: threads of the kernels.
        constants: packed weights shared with the network's other programs.
    """

    def __init__(
        self, module: fx.GraphModule, x: Tensor, threads: int, constants: Constants
    ) -> None:
        lowering = lower(module, x, threads, constants)
        self.module = module
        self.threads = threads
        self.values, self.output, self.results = lowering.values, lowering.output, lowering.results
        builder = lowering.builder
        self.arena = kernels.allocate(place(list(builder.buffers.values())))
        self.scratch = kernels.allocate(threads * (builder.scratch + kernels.SLACK))
        self.kept: list[Tensor] = []
        self.inputs: list[Step] = []  # one for each group of images
        self.parts: list[_Stretch | TorchStep] = []
        pending: list[Step] = []
        for step in builder.steps:
            if isinstance(step, NativeStep):
                pending.append(self._finished(step))
                continue
            self._close(pending)
            pending = []
            self.parts.append(step)
        self._close(pending)
        self.images = lowering.input_images
        self.lock = threading.Lock()

    def _close(self, pending: list[Step]) -> None:
        if pending:
            steps = (Step * len(pending))(*pending)
            self.parts.append(_Stretch(steps))
            self.inputs += [step for step in steps if step.kind == Kind.INPUT]

    def _finished(self, step: NativeStep) -> Step:
        done = Step(**step.fields)
        for name, where in step.maps.items():
            setattr(done, name, self.arena.data_ptr() + 4 * where.offset)
        for name, tensor in step.constants.items():
            self.kept.append(tensor)
            setattr(done, name, tensor.data_ptr())
        return done

    def run(self, x: Tensor) -> Any:
        """The network's output for x, which has the program's shape."""
        with self.lock:
            for group, step in enumerate(self.inputs):
                step.x = x.data_ptr() + 4 * group * self.images * x.stride(0)
                step.strides[:] = x.stride()
            env: dict[fx.Node, Any] = {}
            for part in self.parts:
                if isinstance(part, _Stretch):
                    kernels.run(part.steps, self.threads, self.scratch)
                else:
                    self._run_in_torch(part, env)
            return fx.node.map_arg(self.output, lambda node: self._result(node, env))

    def _value(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node in env:
            return env[node]
        return self.values[node].tensor(self.arena, self.results[node].ndim)

    def _result(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        value = self._value(node, env)
        return value.contiguous().clone() if isinstance(value, Tensor) else value

    def _run_in_torch(self, step: TorchStep, env: dict[fx.Node, Any]) -> None:
        node = step.node
        args = fx.node.map_arg(node.args, lambda n: self._value(n, env))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self._value(n, env))
        match node.op:
            case "get_attr":
                result: Any = self.module
                for name in str(node.target).split("."):
                    result = getattr(result, name)
            case "call_module":
                result = self.module.get_submodule(str(node.target))(*args, **kwargs)
            case "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case _:
                assert callable(node.target)
                result = node.target(*args, **kwargs)
        if step.target is None:
            env[node] = result
        else:
            step.target.tensor(self.arena, result.ndim).copy_(result)
