"""Noticing that packed weights are no longer those of the network."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.errors import UserError
from senet.inference.modules import Across, FusedConv, Pointwise, SqueezeGate


class Watch:
    """What is packed of a graph, to be compared with what is there at each call.

    A tensor counts as changed if it is another object, if PyTorch counted a write to it, or if its
    data lie elsewhere (`tensor.data = …`). Writes that PyTorch does not count (through
    `tensor.data` or a NumPy view) are noticed where they change the largest or the smallest of its
    numbers other than zero: these two are looked at.

    Args:
        graph: the rewritten graph.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        _refuse_unknown(graph)
        self.graph = graph
        self.places: list[tuple[dict[str, Any], str, Any]] = []
        self.sizes: list[tuple[dict[str, Any], int]] = []
        self.tensors: list[Tensor] = []
        self.aliases: list[Tensor] = []  # held, so that nothing else comes to lie where these do
        self.samples: list[ctypes.c_int32] = []
        for target in {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}:
            self._add_path(target)
            module = graph.get_submodule(target)
            if isinstance(module, Across | FusedConv | Pointwise | SqueezeGate | nn.Linear):
                self._add(module)
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                self._add_parameter(str(node.target))
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.versions = [tensor._version for tensor in self.counted]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.strides = [tensor.stride() for tensor in self.tensors]
        self.bits = [sample.value for sample in self.samples]

    def _add_path(self, target: str) -> None:
        module: nn.Module = self.graph
        for name in target.split("."):
            children: dict[str, Any] = module._modules
            self.places.append((children, name, children[name]))
            self.sizes.append((children, len(children)))
            module = children[name]

    def _add_parameter(self, target: str) -> None:
        """Notice where another one takes the place of a parameter that the graph reads itself."""
        owner, _, name = target.rpartition(".")
        if owner:
            self._add_path(owner)
        module = self.graph.get_submodule(owner)
        slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        slot = next(slot for slot in slots if name in slot)
        self.places.append((slot, name, slot[name]))

    def _add(self, module: nn.Module) -> None:
        for part in module.modules():
            slots: tuple[dict[str, Any], ...] = (part._modules, part._parameters, part._buffers)
            for slot in slots:
                for name, value in slot.items():
                    self.places.append((slot, name, value))
                    if isinstance(value, Tensor):
                        self._hold(value)

    def _hold(self, tensor: Tensor) -> None:
        alias = tensor.detach()
        self.tensors.append(tensor)
        self.aliases.append(alias)
        in_reach = alias.device.type == "cpu" and alias.dtype == torch.float32
        if not in_reach or not alias.numel():
            return
        sizes = alias.abs().flatten()
        sizes[sizes == 0] = torch.inf  # not the smallest
        smallest, largest = int(sizes.argmin()), int(alias.abs().argmax())
        for index in {smallest, largest}:
            place = torch.unravel_index(torch.tensor(index), alias.shape)
            steps = sum(int(i) * s for i, s in zip(place, alias.stride(), strict=True))
            self.samples.append(ctypes.c_int32.from_address(alias.data_ptr() + 4 * steps))

    def changed(self) -> bool:
        """Whether something was packed that is no longer so."""
        return (
            [tensor._version for tensor in self.counted] != self.versions
            or [tensor.data_ptr() for tensor in self.tensors] != self.addresses
            or [sample.value for sample in self.samples] != self.bits
            or any(slot.get(name) is not value for slot, name, value in self.places)
            or [tensor.stride() for tensor in self.tensors] != self.strides
            or any(len(children) != count for children, count in self.sizes)
        )

    def wants_gradients(self) -> bool:
        """Whether a weight that was packed asks for a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)


def _refuse_unknown(graph: fx.GraphModule) -> None:
    """Refuse modules that were put into a graph which does not call them.

    Raises:
        UserError: there is one.
    """
    calls = ("call_module", "get_attr")
    called = [str(node.target) for node in graph.graph.nodes if node.op in calls]
    for name, _ in graph.named_modules():
        if name and not any(
            name == target or name.startswith(f"{target}.") or target.startswith(f"{name}.")
            for target in called
        ):
            raise UserError(
                f"the optimized network does not call {name}, which was put into it: change the "
                "original network and optimize that again"
            )
