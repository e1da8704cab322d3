"""Steps of pooling layers and functions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from senet.inference.buffers import Map
from senet.inference.builder import Builder
from senet.inference.places import Places, first_input
from senet.inference.schedule import Geometry

_ADAPTIVE = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


def pair(value: Any) -> tuple[int, int]:
    """A number or two as two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def along_width(value: Any, along_height: int) -> tuple[int, int]:
    """A number along the only dimension of maps of one row, as two."""
    return (along_height, value if isinstance(value, int) else value[0])


class Pools:
    """Writes the steps of pools other than the mean over a whole map.

    Args:
        builder: gets the steps.
        places: where maps lie.
    """

    def __init__(self, builder: Builder, places: Places) -> None:
        self.builder, self.places = builder, places

    def layer(self, node: fx.Node, module: nn.Module, x: Map) -> bool:
        """Write the steps of a layer that reads x; False if it is no pool that the kernels know."""
        match module:
            case nn.AdaptiveAvgPool2d():
                return self._adaptive(node, module.output_size)
            case nn.AdaptiveMaxPool2d() if not module.return_indices:
                return self._adaptive(node, module.output_size, largest=True)
            case nn.MaxPool1d() if module.dilation in (1, (1,)) and not module.return_indices:
                self._along_width(node, x, module, largest=True)
            case nn.AvgPool1d():
                self._along_width(node, x, module, counts=module.count_include_pad)
            case nn.MaxPool2d() if module.dilation in (1, (1, 1)) and not module.return_indices:
                self._pool(node, x, module.kernel_size, module.stride, module.padding, largest=True)
            case nn.AvgPool2d() if module.divisor_override is None:
                self._pool(
                    node,
                    x,
                    module.kernel_size,
                    module.stride,
                    module.padding,
                    counts=module.count_include_pad,
                )
            case _:
                return False
        return True

    def function(self, node: fx.Node) -> bool:
        """Write the steps of a function; False if it is no pool that the kernels know."""
        if node.target in _ADAPTIVE:
            size = (*node.args[1:], node.kwargs.get("output_size"))[0]
            others = len(node.args) > 2 or node.kwargs.get("return_indices", False)
            largest = node.target is F.adaptive_max_pool2d
            return not others and self._adaptive(node, size, largest=largest)
        return node.target in (F.max_pool2d, F.avg_pool2d) and self._function(node)

    def maxima(self, node: fx.Node) -> bool:
        """The maxima over all positions."""
        source = first_input(node)
        dims = (*node.args[1:], node.kwargs.get("dim"))[0]
        rank = self.places.traced[source].ndim
        axes = dims if isinstance(dims, list | tuple) else (dims,)
        if not all(isinstance(axis, int) for axis in axes):
            return False
        if sorted(axis % rank for axis in axes) != list(range(2, rank)) or rank < 3:
            return False
        window = self.places.shape(source)[1:3]
        self._pool(node, self.places.read(source), window, window, 0, largest=True)
        return True

    def _function(self, node: fx.Node) -> bool:
        largest = node.target is F.max_pool2d
        names = [
            "kernel_size",
            "stride",
            "padding",
            *(["dilation"] if largest else []),
            "ceil_mode",
        ]
        if not largest:
            names += ["count_include_pad", "divisor_override"]
        given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        if any(isinstance(value, fx.Node) for value in given.values()):
            return False
        if given.pop("dilation", 1) != 1 or given.pop("return_indices", False):
            return False
        if given.pop("divisor_override", None) is not None:
            return False
        source = first_input(node)
        self._pool(
            node,
            self.places.read(source),
            given["kernel_size"],
            given.get("stride"),
            given.get("padding", 0),
            largest=largest,
            counts=bool(given.get("count_include_pad", True)),
        )
        return True

    def _adaptive(self, node: fx.Node, size: Any, *, largest: bool = False) -> bool:
        """Windows of one size: False where they are not."""
        source = first_input(node)
        given = size if isinstance(size, list | tuple) else (size, size)
        whole = self.places.shape(source)[1:3]
        outputs = [old if new is None else new for old, new in zip(whole, given, strict=True)]
        if not all(isinstance(new, int) and new > 0 for new in outputs):
            return False
        if any(old % new for old, new in zip(whole, outputs, strict=True)):
            return False
        window = (whole[0] // outputs[0], whole[1] // outputs[1])
        self._pool(node, self.places.read(source), window, window, 0, largest=largest)
        return True

    def _along_width(
        self,
        node: fx.Node,
        x: Map,
        module: nn.MaxPool1d | nn.AvgPool1d,
        *,
        largest: bool = False,
        counts: bool = True,
    ) -> None:
        kernel, stride = along_width(module.kernel_size, 1), along_width(module.stride, 1)
        padding = along_width(module.padding, 0)
        self._pool(node, x, kernel, stride, padding, largest=largest, counts=counts)

    def _pool(
        self,
        node: fx.Node,
        x: Map,
        kernel: Any,
        stride: Any,
        padding: Any,
        *,
        largest: bool = False,
        counts: bool = True,
    ) -> None:
        stride = kernel if stride is None else stride
        geometry = Geometry(pair(kernel), pair(stride), pair(padding))
        self.builder.pool(x, self.places.new(node), geometry, largest=largest, padding=counts)
