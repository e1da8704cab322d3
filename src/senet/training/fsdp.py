"""A network, its gradients and its optimizer spread over processes: FSDP2 (`fully_shard`).

Each process holds a part of every parameter, along its first dimension, as a `DTensor`. The blocks
of the network are gathered one after the other: within its forward and backward a block's
parameters are plain tensors, so that the fused operator sees no difference. Buffers (statistics of
batch norm) are each process's own, as under DDP, where those of the main process count.

What is saved is the whole, gathered in the main process, in the form that DDP and a single process
give; each of them can go on from it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from senet.errors import SenetError
from senet.nn.block import SqueezeExcitation


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: the blocks; what is left goes with the root.

    A block is the outermost module with a forward of its own: containers are looked into, single
    layers belong to the root, because `senet.nn` reads the parameters of some without calling
    them. So does SE that stands alone: it is small, and `senet.insert` puts some behind
    activations that work in place, which PyTorch refuses on the input of a gathered module.
    """
    gates = {
        id(p)
        for module in model.modules()
        if isinstance(module, SqueezeExcitation)
        for p in module.parameters()
    }
    found = []
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            found += units(child)
        elif any(child.children()) and any(id(p) not in gates for p in child.parameters()):
            found.append(child)
    return found


def shard(model: nn.Module, device: torch.device, processes: int) -> None:
    """Spread `model` over all processes, each of which calls this with the same weights.

    Its parameters become sharded `DTensor`s on the device. Never call it twice, nor copy the
    model after it.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called."""
    return isinstance(model, FSDPModule)


@contextmanager
def forward_of(model: nn.Module) -> Iterator[None]:
    """Around a forward pass of a sharded model, or of another.

    Raises:
        SenetError: a block changes its input in place, which PyTorch refuses. Nothing is done about
            it: a network may count on the change.
    """
    try:
        yield
    except RuntimeError as error:
        if is_sharded(model) and "modified inplace" in str(error):
            raise SenetError(
                "a block of the network changes its input in place (by ReLU(inplace=True) or +=), "
                "which FSDP does not allow: give --parallel ddp"
            ) from error
        raise


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any, *, main: bool) -> Any:
    """A state dict with its sharded tensors whole and on the CPU.

    Every process must call it. Others than the main one get None in their place, so that it is
    the only one to hold more than a tensor at a time.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if main else None
    if isinstance(state, dict):
        return {key: gathered(value, main=main) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, main=main) for value in state]
    return state


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of `gathered` for a tensor: sharded as `like` is, or as it was if `like` is not.

    Every process must have the whole; nothing is sent.
    """
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    whole = whole.to(like.device).contiguous()
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def scattered_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A whole state dict of `model`, sharded as the model is."""
    likes = model.state_dict()
    return {name: scattered(tensor, likes.get(name, tensor)) for name, tensor in state.items()}


def scattered_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state dict of `optimizer`, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {
            name: scattered(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def release(model: nn.Module) -> None:
    """Give back what a sharded model's last forward pass left gathered, if no backward followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def together(
    batches: Iterable[tuple[Tensor, Tensor]], model: nn.Module
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Batches for the evaluation of `model`, and whether each counts.

    The forward pass of a sharded model needs every process: where the batches of one have ended
    before those of another, it gets the first image of its last one again, which does not count.
    """
    if not is_sharded(model):
        yield from ((images, labels, True) for images, labels in batches)
        return
    device = next(model.parameters()).device

    def anywhere(more: bool) -> bool:
        count = torch.tensor(float(more), device=device)
        dist.all_reduce(count)
        return bool(count > 0)

    images = labels = None
    for images, labels in batches:
        anywhere(True)
        yield images, labels, True
    while images is not None and labels is not None and anywhere(False):
        yield images[:1], labels[:1], False
