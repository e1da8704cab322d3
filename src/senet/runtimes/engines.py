"""The engines that `senet predict` can run a network with, and batches decoded ahead of them."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from senet.errors import UserError
from senet.inference import optimize
from senet.runtimes.export import export
from senet.runtimes.sessions import Run, open_exported

Engine = Literal["eager", "optimized", "onnx", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def make_engine(
    name: Engine, model: nn.Module, example: Tensor, device: torch.device | None = None
) -> Run:
    """A function from images (N,C,H,W), float32 on the CPU, to logits (N,K) on the CPU.

    Args:
        name: "eager" (the model as it is), "optimized" (`senet.optimize`), "onnx" (ONNX Runtime)
            or "openvino"; the last two export the model into a temporary folder first and check
            the file.
        model: the network.
        example: images of the size that will come.
        device: where "eager" and "optimized" run; the CPU by default, where the other two run.

    Raises:
        UserError: unknown name, a missing runtime, or a device that the engine does not have.
    """
    device = device or torch.device("cpu")
    if name not in ENGINES:
        raise UserError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name in ("onnx", "openvino"):
        if device.type != "cpu":
            raise UserError(f"engine {name!r} runs on the CPU; use --device cpu, not {device}")
        suffix = ".onnx" if name == "onnx" else ".xml"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{suffix}"
            export(model, path, example_input=example)
            return open_exported(path).run
    network = model.eval() if name == "eager" else optimize(model, example)
    network = network.to(device)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(x.to(device, memory_format=torch.channels_last)).float().cpu()

    return run


def load_ahead(
    items: Iterable[Item], load: Callable[[Item], Loaded], batch_size: int, ahead: int = 2
) -> Iterator[list[Loaded]]:
    """Batches of loaded items, in order; the next ones are loaded while the caller works.

    Args:
        items: what to load, image files for instance.
        load: loads one; runs in threads (Pillow decodes and resizes outside of Python's lock).
        batch_size: items of a batch.
        ahead: batches that are loaded ahead.
    """
    iterator = iter(items)
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[list[Future[Loaded]]] = deque()
        while True:
            while len(waiting) <= ahead:
                part = list(itertools.islice(iterator, batch_size))
                if not part:
                    break
                waiting.append([pool.submit(load, item) for item in part])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]
