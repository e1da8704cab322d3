"""What code may change or ask for beside the operations it consists of, kept and compared."""

from __future__ import annotations

import copy
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MISSING = object()
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_PLAIN = (bool, int, float, complex, str, bytes)
# What every module has is not the forward's to set, but for buffers; sharding exchanges parameters.
_NOT_CODES = vars(nn.Module()).keys() - {"_buffers"} | {"forward"}


class RandomState:
    """The random numbers of Python, NumPy and PyTorch, at the time this is made."""

    def __init__(self) -> None:
        self.python, self.numpy, self.torch = random.getstate(), _numpy(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def moved(self) -> bool:
        """Whether any were drawn since."""
        now = RandomState()
        same = self.python == now.python and self.numpy == now.numpy
        devices = zip(self.cuda, now.cuda, strict=False)
        return not (same and torch.equal(self.torch, now.torch) and all(map(_equal, devices)))

    def restore(self) -> None:
        """Draw from now on what would have come then."""
        random.setstate(self.python)
        name, key, *rest = self.numpy
        np.random.set_state((name, np.frombuffer(key, np.uint32), *rest))  # noqa: NPY002  # the global ones
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def _numpy() -> tuple[Any, ...]:
    name, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return (name, np.asarray(key).tobytes(), *rest)


def _equal(pair: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(*pair)


class ModuleState:
    """The attributes of a module and of those within it, and the contents of buffers and lists."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = [(m, dict(vars(m))) for m in module.modules()]
        self.contents: dict[int, tuple[Any, Any]] = {}
        self.tensors: dict[int, tuple[Tensor, int, Tensor]] = {}
        self.generators: list[tuple[Any, Callable[[], Any], Callable[[Any], Any]]] = []
        for _, attributes in self.attributes:
            for name, value in attributes.items():
                if name not in _NOT_CODES:
                    self._keep(value)

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor):
            lazy = torch.nn.parameter.is_lazy(value)
            if not (isinstance(value, nn.Parameter) or lazy or value.is_inference()):
                self.tensors[id(value)] = value, value._version, value.detach().clone()
        elif type(value) in _CONTAINERS and id(value) not in self.contents:
            self.contents[id(value)] = value, copy.copy(value)
            for inner in value.values() if isinstance(value, dict) else value:
                self._keep(inner)
        elif type(value) is tuple:
            for inner in value:
                self._keep(inner)
        elif isinstance(value, torch.Generator):
            self.generators.append((value.get_state(), value.get_state, value.set_state))
        elif isinstance(value, random.Random):
            self.generators.append((value.getstate(), value.getstate, value.setstate))

    def changed(self) -> str | None:
        """What is no longer as it was; None for nothing."""
        for module, before in self.attributes:
            for name in _differing(module, before):
                return f"{type(module).__name__}.{name}"
            for name, value in before.items():
                if self._is_changed(value):
                    return f"{type(module).__name__}.{name}"
                if isinstance(value, dict):  # of buffers, for instance
                    inner = next((k for k, v in value.items() if self._is_changed(v)), None)
                    if inner is not None:
                        return f"{type(module).__name__}.{inner}"
        if any(tensor._version != version for tensor, version, _ in self.tensors.values()):
            return "a tensor among its attributes"
        contents = self.contents.values()
        if any(not _same_contents(value, kept) for value, kept in contents):
            return "a list among its attributes"
        return None if not self._drawn() else "a generator of random numbers"

    def _is_changed(self, value: Any) -> bool:
        if id(value) in self.tensors:
            tensor, version, _ = self.tensors[id(value)]
            return tensor._version != version
        return id(value) in self.contents and not _same_contents(*self.contents[id(value)])

    def _drawn(self) -> bool:
        for found, get, _ in self.generators:
            now = get()
            if not (torch.equal(found, now) if isinstance(now, Tensor) else found == now):
                return True
        return False

    def restore(self) -> None:
        """Make all of it as it was."""
        for module, before in self.attributes:
            for name in _differing(module, before):
                if name in before:
                    module.__dict__[name] = before[name]
                else:
                    del module.__dict__[name]
        for value, kept in self.contents.values():
            if not _same_contents(value, kept):
                value.clear()
                value.extend(kept) if isinstance(value, (list, deque)) else value.update(kept)
        with torch.no_grad():
            for tensor, version, kept in self.tensors.values():
                if tensor._version != version:
                    tensor.copy_(kept)
        for found, _, put in self.generators:
            put(found)


def _differing(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Names of attributes that are others than before."""
    now = vars(module)
    names = dict.fromkeys((*before, *now))
    return [
        name
        for name in names
        if name not in _NOT_CODES and not _same(before.get(name, _MISSING), now.get(name, _MISSING))
    ]


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in _PLAIN and a == b)


def _same_contents(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(k in b and _same(v, b[k]) for k, v in a.items())
    return all(map(_same, a, b))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect what code of this thread does that no graph of its operations holds.

    Modes of autograd and autocast, checkpointing and hooks on saved tensors, and functions with a
    backward of their own. What asks for a mode may depend on it.
    """
    noted: list[str] = []
    thread = threading.get_ident()

    def note(what: str, real: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                noted.append(what)
            return real(*args, **kwargs)

        return noting

    function = torch.autograd.Function
    apply = function.__dict__["apply"]
    places: list[tuple[Any, str, str]] = [
        (torch._C, "_set_grad_enabled", "the grad mode"),
        (torch, "is_grad_enabled", "the grad mode"),
        (torch.inference_mode, "__enter__", "the inference mode"),
        (torch, "is_inference_mode_enabled", "the inference mode"),
        (torch.autocast, "__enter__", "autocast"),
        (torch, "is_autocast_enabled", "autocast"),
        (torch._C._autograd, "_push_saved_tensors_default_hooks", "hooks on saved tensors"),
    ]
    real = [getattr(holder, name) for holder, name, _ in places]
    own = note("a function with a backward of its own", lambda cls, *a, **k: _applied(cls, a, k))

    def _applied(cls: Any, args: Any, kwargs: Any) -> Any:
        return apply.__get__(None, cls)(*args, **kwargs)

    try:
        for (holder, name, what), before in zip(places, real, strict=True):
            setattr(holder, name, note(what, before))
        function.apply = classmethod(own)
        yield noted
    finally:
        function.apply = apply
        for (holder, name, _), before in zip(places, real, strict=True):
            setattr(holder, name, before)
