"""The layers of any network, for learning rates that fall with the distance from the head."""

from collections.abc import Iterator

from torch import nn

_LISTS = (nn.Sequential, nn.ModuleList)


def layers_of(model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each layer, from the images to the head.

    A layer is a child of the network, and of a Sequential or ModuleList each of its own children:
    a block of a stage. What holds nothing but parameters of one dimension, as a batch norm does,
    belongs to the layer before.

    Args:
        model: its children are defined in the order in which they run.
    """
    layers: list[list[str]] = []
    for module, names in _parts(model, ""):
        norm = all(parameter.ndim <= 1 for parameter in module.parameters())
        if norm and layers:
            layers[-1] += names
        elif names:
            layers.append(names)
    return layers


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, list[str]]]:
    for name, child in module.named_children():
        if isinstance(child, _LISTS):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield child, [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter: decay to the number of layers behind its own.

    Args:
        model: see `layers_of`; parameters of the network itself count with the first layer.
        decay: in (0, 1].
    """
    layers = layers_of(model)
    last = max(len(layers) - 1, 0)
    rates = {name: decay**last for name, _ in model.named_parameters()}
    for depth, names in enumerate(layers):
        rates |= dict.fromkeys(names, decay ** (last - depth))
    return rates
