"""The programs of one graph: made when a shape comes for the first time, shared by all threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx

from senet.inference.program import Program
from senet.inference.shapes import outline
from senet.inference.steps import Constants
from senet.inference.weights import Watch
from senet.inference.workspaces import Workspaces

# Bytes of programs that are kept; some 40 KB each, so hundreds of shapes. Those used last stay.
KEPT_BYTES = 64 << 20


class Plans:
    """Programs by input shape and number of threads, with packed weights and memory in common.

    Making one only reads the graph, and any number of threads may run them at the same time.

    Args:
        graph: the rewritten graph.

    Attributes:
        programs: those that are kept, the one used last at the end.
        constants: packed weights of all programs.
        workspaces: memory for runs.
        watch: tells whether the packed weights are still those of the graph.

    Raises:
        UserError: the graph holds modules that it does not call.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self.constants: Constants = {}
        self.workspaces = Workspaces()
        self.watch = Watch(graph)
        self._empty = outline(graph)
        self._planning, self._lookup = threading.Lock(), threading.Lock()

    def run(self, x: Tensor) -> Any:
        """The network's output for x (N,C,H,W), float32, on the CPU."""
        program = self.program(x)
        with self.workspaces.lent(program.size) as workspace:
            return program.run(x, workspace)

    def program(self, x: Tensor) -> Program:
        """The program for the shape of x and the number of threads in use."""
        threads = torch.get_num_threads()
        key = (tuple(x.shape), threads)
        found = self._known(key)
        if found is not None:
            return found
        with self._planning:
            found = self._known(key)  # another thread may have made it
            if found is None:
                found = Program(self.graph, x, threads, self.constants, self._empty)
                self._keep(key, found)
        return found

    def _known(self, key: tuple[Any, ...]) -> Program | None:
        with self._lookup:
            found = self.programs.get(key)
            if found is not None:
                self.programs.move_to_end(key)
            return found

    def _keep(self, key: tuple[Any, ...], program: Program) -> None:
        with self._lookup:
            self.programs[key] = program
            held = sum(each.bytes for each in self.programs.values())
            while held > KEPT_BYTES and len(self.programs) > 1:
                held -= self.programs.popitem(last=False)[1].bytes
