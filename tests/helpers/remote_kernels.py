"""A pytest plugin: the tests' kernels are those of another processor's library, in an emulator.

`SENET_REMOTE="qemu-aarch64 -L SYSROOT DRIVER LIBRARY" pytest -p remote_kernels …`: each call of a
kernel goes to `remote_kernels.cpp` with the memory that it may touch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shlex
import struct
import subprocess
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from senet import kernels
from senet.kernels import structs

_ARGUMENTS: dict[str, type[ctypes.Structure]] = {
    "tail_forward": structs.TailArguments,
    "tail_backward": structs.TailArguments,
    "join_forward": structs.JoinArguments,
    "join_backward": structs.JoinArguments,
    "depthwise_forward": structs.DepthwiseArguments,
    "depthwise_backward": structs.DepthwiseArguments,
    "convolution_forward": structs.ConvolutionArguments,
    "convolution_input_gradient": structs.ConvolutionArguments,
    "convolution_weights_gradient": structs.ConvolutionArguments,
}
_SCRATCH = -1  # the place of an address that is no part of the block
_PAGE = 4096


def _numbers(*values: int) -> bytes:
    return struct.pack(f"={len(values)}q", *values)


def _text(value: bytes) -> bytes:
    return _numbers(len(value)) + value


def _pointers(structure: type[ctypes.Structure], start: int = 0) -> Iterator[int]:
    for name, kind, *_ in structure._fields_:
        at = start + getattr(structure, name).offset
        if kind is ctypes.c_void_p:
            yield at
        elif issubclass(kind, ctypes.Structure):
            yield from _pointers(kind, at)


def _all_pointers(structure: type[ctypes.Structure], size: int) -> Iterator[int]:
    """Where a block holds addresses: its structure, and what follows (branches, steps)."""
    first = ctypes.sizeof(structure)
    follower = structs.JoinBranch if structure is structs.JoinArguments else structure
    return chain(
        _pointers(structure),
        *(_pointers(follower, at) for at in range(first, size, ctypes.sizeof(follower))),
    )


_old: list[torch.Tensor] = []  # those that were there before the tests


def _tensors() -> list[torch.Tensor]:
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return [
        each
        for each in found
        if each.device.type == "cpu"
        and each.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(each)
    ]


def _memory() -> list[tuple[int, int]]:
    """Address and size of the memory of all tensors."""
    storages = (each.untyped_storage() for each in [*_old, *_tensors()])
    return sorted({(each.data_ptr(), each.nbytes()) for each in storages})


def pytest_collection_finish() -> None:
    """Look no more at the objects of all imported modules, which are many, at each call."""
    _old.extend(_tensors())
    gc.collect()
    gc.freeze()


class RemoteLibrary:
    """What `senet.kernels.LIBRARY` is, but for the processor that computes.

    Args:
        command: starts the driver.
    """

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        function = name.removeprefix("senet_")
        if function == "run":
            return self._run
        if structure := _ARGUMENTS.get(function):
            return lambda *given: self._call(name, structure, *given)
        return lambda: self._ask(name)

    def senet_isa(self) -> bytes:
        return self._ask("senet_isa").to_bytes(8, "little").rstrip(b"\0")

    def _send(self, *parts: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()

    def _receive(self, size: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(size)
        assert len(data) == size, "the driver has ended"
        return data

    def _answer(self) -> int:
        return int(struct.unpack("=q", self._receive(8))[0])

    def _ask(self, name: str) -> int:
        self._send(_text(name.encode()), _numbers(-1), _text(b""), _numbers(0, 0, 0))
        return self._answer()

    def _run(self, steps: Any, count: int, threads: int, scratch: int, share: int) -> None:
        self._compute("senet_run", -1, bytes(steps), structs.Step, (count, threads, share), scratch)

    def _call(self, name: str, structure: type[ctypes.Structure], *given: Any) -> int:
        kind, block = given if len(given) == 2 else (-1, *given)
        return self._compute(name, kind, block, structure)

    def _compute(
        self,
        name: str,
        kind: int,
        block: bytes,
        structure: type[ctypes.Structure],
        numbers: Iterable[int] = (),
        scratch: int = 0,
    ) -> int:
        self.calls += 1
        addresses = {_SCRATCH: scratch} if scratch else {}
        for at in _all_pointers(structure, len(block)):
            if address := struct.unpack_from("=q", block, at)[0]:
                addresses[at] = address
        memory, regions, places = _memory(), [], []
        for at, address in addresses.items():
            inside = (r for r in memory if r[0] <= address < r[0] + r[1])
            # Of what is empty the address may be the end of what lies before it.
            behind = (r for r in memory if address == r[0] + r[1])
            region = next(chain(inside, behind), None)
            assert region is not None, f"{name}: no tensor holds the address at {at}"
            if region not in regions:
                regions.append(region)
            places.append((at, regions.index(region), address - region[0]))
        numbers = tuple(numbers)
        self._send(
            _text(name.encode()), _numbers(kind), _text(block),
            _numbers(len(numbers), *numbers), _numbers(len(regions)),
            *(_numbers(size, at % _PAGE) + ctypes.string_at(at, size) for at, size in regions),
            _numbers(len(places), *chain.from_iterable(places)),
        )  # fmt: skip
        status = self._answer()
        for at, size in regions:
            ctypes.memmove(at, self._receive(size), size)
        return status


LIBRARY = RemoteLibrary(os.environ["SENET_REMOTE"])
kernels.LIBRARY, kernels.MISSING = LIBRARY, ""  # type: ignore[assignment]
kernels.ISAS = (kernels.instruction_set(),)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{LIBRARY.calls} calls of {kernels.ISAS[0]} kernels")


def pytest_unconfigure() -> None:
    LIBRARY.process.communicate()
