"""Steps for the C++ kernels from modules and maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from senet.inference import kernels, packing
from senet.inference.buffers import Buffer, Map, new_map
from senet.inference.chains import Cut
from senet.inference.modules import FusedConv, Pointwise, SqueezeGate
from senet.inference.schedule import (
    Geometry,
    Tasks,
    convolution_tasks,
    depthwise_tasks,
    narrow_groups,
    pairs_groups,
    row_stride,
    slides,
    sliding_floats,
    sliding_tasks,
    winograd_tasks,
    winograd_tile,
)
from senet.inference.steps import Constants, Ending, NativeStep, Sums, TorchStep, ending
from senet.kernels.structs import Activation as Function
from senet.kernels.structs import Kind, Limit
from senet.ops.activations import LINEAR, RELU, Activation

# Rows of a task that passes over a map once.
_PASS_ROWS = 256
# Weights of an excitation that stay in a core's cache from image to image.
CACHED_WEIGHTS = 1 << 15
# Images whose gates a task computes with one panel of weights.
_EXCITATION_IMAGES = 8
Maps = Mapping[str, Map | Buffer | None]
Fields = Mapping[str, float]
# The gates of our own SE block, as functions that end a step.
_GATES = {
    "sigmoid": Function.SIGMOID,
    "tanh": Function.TANH,
    "relu": Function.RELU,
    "hard_sigmoid": Function.HARDSIGMOID,
    "identity_sigmoid": Function.IDENTITY_SIGMOID,
}


@dataclass(frozen=True)
class Chained:
    """A convolution of a chain and what it reads beside the one before.

    Attributes:
        name: the module's name.
        module: the module.
        shape: N, H, W, C of its output.
        gates: of its output.
        shortcut: of its output.
        input_gates: of its input.
    """

    name: str
    module: FusedConv
    shape: tuple[int, int, int, int]
    gates: Map | None
    shortcut: Map | None
    input_gates: Map | None


def takes_input_gates(module: FusedConv) -> bool:
    """Whether the kernels can scale a convolution's input as they read it."""
    dense = module.groups == 1 and module.unpadded
    return dense and module.weight.shape[2:] == (1, 1) and module.stride == (1, 1)


def native_gate(module: SqueezeGate) -> bool:
    """Whether the kernels know the activation and the gate of an SE block."""
    return module.gate_name in _GATES and isinstance(module.activation, nn.ReLU)


def _ends(maps: Maps) -> tuple[Map, Map]:
    """What a step reads and what it writes."""
    x, y = maps["x"], maps["y"]
    assert isinstance(x, Map)
    assert isinstance(y, Map)
    return x, y


class Builder:
    """Collects the steps of a program.

    Args:
        threads: threads that will run it.
        constants: packed weights that other programs of the network have already; added to.

    Attributes:
        steps: the steps so far.
        buffers: their buffers.
        scratch: floats of scratch memory that a thread needs.
    """

    def __init__(self, threads: int, constants: Constants) -> None:
        self.threads = threads
        self.constants = constants
        self.steps: list[NativeStep | TorchStep] = []
        self.buffers: dict[int, Buffer] = {}
        self.scratch = 16
        self._lines = 0

    def touch(self, where: Map | Buffer) -> None:
        """Note that the next step uses a buffer."""
        buffer = where if isinstance(where, Buffer) else where.buffer
        buffer.use(len(self.steps))
        self.buffers[id(buffer)] = buffer

    def emit(
        self,
        kind: Kind,
        maps: Maps,
        fields: Fields,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a step; the shapes of x and y become its sizes where `fields` has no others."""
        present = {name: where for name, where in maps.items() if where is not None}
        numbers: dict[str, float] = {"kind": int(kind)}
        for name, where in present.items():
            self.touch(where)
            if isinstance(where, Map) and f"{name}_ld" in kernels.STRIDES:
                numbers[f"{name}_ld"] = where.ld
        x, y = present["x"], present.get("y")
        if isinstance(x, Map):
            numbers |= zip("NHWC", x.shape, strict=True)
        if isinstance(y, Map):
            numbers |= zip(("OH", "OW", "OC"), y.shape[1:], strict=True)
        self.steps.append(NativeStep(numbers | dict(fields), present, dict(constants or {})))

    def constant(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        """A constant in the kernels' order, made once for all programs of the network."""
        if key not in self.constants:
            self.constants[key] = packing.into(make())
        return self.constants[key]

    def convolution(
        self,
        name: str,
        module: FusedConv,
        x: Map,
        y: Map,
        gates: Map | None = None,
        shortcut: Map | None = None,
        *,
        input_gates: Map | None = None,
        sums: bool = False,
    ) -> Sums | None:
        """y = δ(gates ⊙ conv(input_gates ⊙ x) + shortcut); y may be where the shortcut is.

        `input_gates` only for a convolution that `takes_input_gates`.
        With `sums` the step adds up y as it writes it, and they are returned; None where it cannot.
        """
        kernel = (module.weight.shape[2], module.weight.shape[3])
        _, H, W, C = x.shape
        ending = self._ending(name, module, y.shape[3])
        before, _ = module.zeros(H, W)
        geometry = Geometry(kernel, module.stride, before, module.dilation, module.groups)
        even = geometry.output(H, W) == y.shape[1:3]  # as many zeros behind as before
        tile = winograd_tile(geometry, C, y.shape[3], H, W) if even else 0
        maps = {"x": x, "y": y, "gates": gates, "shortcut": shortcut, "input_gates": input_gates}
        if geometry.groups == C == y.shape[3] and 1 < C <= Limit.CHANNELS:
            taps = self.constant((name, "taps"), lambda: packing.depthwise(module.weight))
            return self._depthwise(name, module, taps, geometry, maps, ending, sums)
        if narrow_groups(geometry, C, y.shape[3]):
            taps = self.constant((name, "taps"), lambda: packing.grouped(module.weight))
            return self._by_rows(
                Kind.GROUPED, name, module, taps, geometry, maps, ending, y.shape[1] if sums else 0
            )
        if tile:
            return self._winograd(name, module, geometry, maps, ending, tile, sums)
        if gates is None and shortcut is None and pairs_groups(geometry, C, y.shape[3]):
            return self._paired(name, module, geometry, maps, ending, sums)
        merge = packing.merged_groups(geometry.groups, y.shape[3] // geometry.groups)
        groups = geometry.groups // merge
        weights = self.constant(
            (name, "panels"), lambda: packing.convolution(module.weight, module.groups, merge)
        )
        bias = self.constant((name, "panel bias"), lambda: packing.panel_bias(module.bias, groups))
        return self._product(maps, weights, bias, ending, geometry, groups, sums)

    def chain(
        self, links: Sequence[Chained], x: Map, y: Map, cut: Cut, *, sums: bool = False
    ) -> Sums | None:
        """Convolutions one behind the other, some rows at a time; see `senet.inference.chains`."""
        start, scratch = len(self.steps), self.scratch
        self.scratch = 16
        fields = {"rows": cut.rows, "parts": cut.parts, "steps": len(links)}
        self.emit(Kind.CHAIN, {"x": x, "y": y}, fields)
        summed, source, floats = None, x, 0
        for number, (each, lines) in enumerate(zip(links, cut.lines, strict=True)):
            last = number == len(links) - 1
            target = y if last else new_map(each.shape)
            self._lines = lines
            summed = self.convolution(
                each.name,
                each.module,
                source,
                target,
                each.gates,
                each.shortcut,
                input_gates=each.input_gates,
                sums=sums and last,
            )
            step = self.steps[-1]
            assert isinstance(step, NativeStep)
            step.fields["lines"] = lines
            if number:
                del step.maps["x"]
            if not last:  # in scratch memory
                del step.maps["y"], self.buffers[id(target.buffer)]
                floats += lines * target.shape[2] * target.ld
            source = target
        self._lines = 0
        self.scratch = max(scratch, floats + self.scratch)
        self._together(start)
        return summed

    def _together(self, start: int) -> None:
        """Keep what the steps from `start` on use as long as any of them runs.

        Their tasks are at different steps at the same time.
        """
        last = len(self.steps) - 1
        for step in self.steps[start:]:
            assert isinstance(step, NativeStep)
            for where in step.maps.values():
                buffer = where if isinstance(where, Buffer) else where.buffer
                buffer.use(start)
                buffer.use(last)

    def _summed(self, y: Map, blocks: int) -> Sums:
        return Sums(y, new_map((y.shape[0] * blocks, 1, 1, y.shape[3])), blocks)

    def _emit_summing(
        self,
        kind: Kind,
        maps: Maps,
        fields: Fields,
        constants: Mapping[str, Tensor],
        tasks: Tasks,
        blocks: int,
    ) -> Sums | None:
        """A step in tasks that also sums each image in so many blocks; no sums for none."""
        summed = self._summed(_ends(maps)[1], blocks) if blocks else None
        self.emit(
            kind,
            {**maps, "sums": None if summed is None else summed.parts},
            {**fields, "rows": tasks.rows, "panels": tasks.panels},
            constants,
        )
        return summed

    def _product(
        self,
        maps: Maps,
        weights: Tensor,
        bias: Tensor,
        ending: Ending,
        geometry: Geometry,
        groups: int = 1,
        sums: bool = False,
    ) -> Sums | None:
        x, y = _ends(maps)
        depth = geometry.kernel[0] * geometry.kernel[1] * x.shape[3] // groups
        _, OH, _, OC = y.shape
        panels = groups * math.ceil(OC / groups / kernels.PANEL)
        packed = replace(geometry, groups=groups)
        if slides(packed, x.shape[3], OC):
            tasks = self._sliding_tasks(geometry, y, x.shape[3] // groups, panels)
            blocks = math.ceil(OH / tasks.rows) if sums else 0
            fields = packed.fields() | ending.fields
            constants = {"weights": weights, "bias": bias, **ending.constants}
            return self._emit_summing(Kind.SLIDING, maps, fields, constants, tasks, blocks)
        scaled = maps.get("input_gates") is not None
        images = y.shape[0] if sums or scaled or maps.get("gates") is not None else 1
        if self._lines:
            rows = self._lines * y.shape[2]
            tasks = Tasks(rows, panels, 0 if geometry.in_place else rows * row_stride(depth))
        else:
            tasks = convolution_tasks(
                images, y.pixels // images, depth, panels, geometry.in_place, self.threads
            )
        panel = depth * kernels.PANEL if scaled else 0  # the panel that is scaled
        self.scratch = max(self.scratch, tasks.scratch, panel)
        fields = geometry.fields() | ending.fields | {"groups": groups}
        constants = {"weights": weights, "bias": bias, **ending.constants}
        blocks = math.ceil(y.pixels / images / tasks.rows) if sums else 0
        return self._emit_summing(Kind.CONVOLUTION, maps, fields, constants, tasks, blocks)

    def _paired(
        self,
        name: str,
        module: FusedConv,
        geometry: Geometry,
        maps: Maps,
        ending: Ending,
        sums: bool,
    ) -> Sums | None:
        """A grouped convolution, two groups at a time; without gates and shortcut."""
        x, y = _ends(maps)
        groups = geometry.groups
        constants = ending.constants | {
            "weights": self.constant((name, "pairs"), lambda: packing.pairs(module.weight, groups)),
            "bias": self.constant(
                (name, "pair bias"), lambda: packing.pair_bias(module.bias, groups)
            ),
        }
        pairs, inputs = math.ceil(groups / 2), 2 * x.shape[3] // groups
        tasks = self._sliding_tasks(geometry, y, inputs, pairs)
        blocks = math.ceil(y.shape[1] / tasks.rows) if sums else 0
        fields, ends = geometry.fields() | ending.fields, {"x": x, "y": y}
        return self._emit_summing(Kind.PAIRED, ends, fields, constants, tasks, blocks)

    def _sliding_tasks(self, geometry: Geometry, y: Map, inputs: int, panels: int) -> Tasks:
        """The tasks of a convolution that slides over rows of so many inputs; of a chain's, one."""
        N, OH, OW, _ = y.shape
        if self._lines:
            floats = sliding_floats(geometry, OW, inputs, self._lines)
            tasks = Tasks(self._lines, panels, floats)
        else:
            tasks = sliding_tasks(geometry, N, OH, OW, inputs, panels, self.threads)
        self.scratch = max(self.scratch, tasks.scratch)
        return tasks

    def _winograd(
        self,
        name: str,
        module: FusedConv,
        geometry: Geometry,
        maps: Maps,
        ending: Ending,
        tile: int,
        sums: bool,
    ) -> Sums | None:
        x, y = _ends(maps)
        constants = ending.constants | {
            "weights": self.constant(
                (name, "winograd", tile), lambda: packing.winograd(module.weight, tile)
            ),
            "bias": self.constant((name, "panel bias"), lambda: packing.panel_bias(module.bias, 1)),
        }
        N, OH, OW, OC = y.shape
        tiles = N * math.ceil(OH / tile) * math.ceil(OW / tile)
        panels = math.ceil(OC / kernels.PANEL)
        tasks, patches_first = winograd_tasks(tile, tiles, x.shape[3], panels, self.threads)
        self.scratch = max(self.scratch, tasks.scratch)
        fields = geometry.fields() | {
            **ending.fields,
            "tile": tile,
            "tiles": tasks.rows,
            "panels": tasks.panels,
        }
        summed = self._summed(y, tiles // N) if sums else None
        maps = {**maps, "sums": None if summed is None else summed.parts}
        if patches_first:
            patches = Buffer((tile + 2) ** 2 * tiles * row_stride(x.shape[3]))
            self.emit(Kind.WINOGRAD_INPUT, {"x": x, "y": y, "patches": patches}, fields)
            self.emit(Kind.WINOGRAD_PRODUCT, {**maps, "patches": patches}, fields, constants)
        else:
            self.emit(Kind.WINOGRAD, maps, fields, constants)
        return summed

    def _depthwise(
        self,
        name: str,
        module: FusedConv,
        taps: Tensor,
        geometry: Geometry,
        maps: Maps,
        ending: Ending,
        sums: bool,
    ) -> Sums | None:
        N, OH, OW, OC = _ends(maps)[1].shape
        if self._lines:
            tasks = Tasks(self._lines, math.ceil(OC / kernels.PANEL), 0)
        else:
            tasks = depthwise_tasks(geometry, N, OH, OW, OC, self.threads)
        blocks = math.ceil(OH / tasks.rows) if sums else 0
        cut = {"rows": tasks.rows, "panels": tasks.panels}
        kind = Kind.DEPTHWISE
        return self._by_rows(kind, name, module, taps, geometry, maps, ending, blocks, cut)

    def _by_rows(
        self,
        kind: Kind,
        name: str,
        module: FusedConv,
        taps: Tensor,
        geometry: Geometry,
        maps: Maps,
        ending: Ending,
        blocks: int,
        cut: Fields | None = None,
    ) -> Sums | None:
        """A convolution in rows of the output, and what follows it in a pass of its own.

        `blocks` are the parts in which it sums an image; 0 where no sums are wanted.
        """
        x, y = _ends(maps)
        constants = {
            "weights": taps,
            "bias": self.constant((name, "bias"), lambda: module.bias),
        }
        fields = geometry.fields() | {"weights_ld": packing.taps_stride(y.shape[3]), **(cut or {})}
        if maps["gates"] is None and maps["shortcut"] is None:
            summed = self._summed(y, blocks) if blocks else None
            parts = None if summed is None else summed.parts
            fields |= ending.fields
            self.emit(kind, {"x": x, "y": y, "sums": parts}, fields, constants | ending.constants)
            return summed
        target = new_map(y.shape)
        self.emit(kind, {"x": x, "y": target}, fields, constants)
        self._pass(target, y, ending, gates=maps["gates"], shortcut=maps["shortcut"])
        return None

    def _pass(
        self,
        x: Map,
        y: Map,
        ending: Ending,
        constants: Mapping[str, Tensor] | None = None,
        **maps: Map | Buffer | None,
    ) -> None:
        """A pass over a map."""
        self.emit(
            Kind.POINTWISE,
            {"x": x, "y": y, **maps},
            {**ending.fields, "rows": _PASS_ROWS},
            {**(constants or {}), **ending.constants},
        )

    def _ending(self, name: str, module: FusedConv | Pointwise, channels: int) -> Ending:
        """What a module ends with."""
        slopes = module.slopes
        if slopes is None:
            return ending(module.activation)
        expanded = self.constant((name, "slopes"), lambda: slopes.expand(channels))
        return Ending(Function.PRELU, 0.0, expanded)

    def linear(self, name: str, module: nn.Linear, x: Map, y: Map) -> None:
        """y = W x + b for vectors."""
        bias = module.weight.new_zeros(module.out_features) if module.bias is None else module.bias
        packed = self._matrix(name, module.weight, bias)
        self._product({"x": x, "y": y}, *packed, Ending(), Geometry())

    def _matrix(self, name: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (outputs, inputs) and bias (outputs,) in the kernels' order."""
        return (
            self.constant((name, "panels"), lambda: packing.panels(weight[None])),
            self.constant((name, "panel bias"), lambda: packing.panel_bias(bias, 1)),
        )

    @contextmanager
    def excitation_of(self, x: Map, cached: bool = True) -> Iterator[int]:
        """Let one thread run the steps that are added here for an image, then for another one.

        Only where their weights stay in its cache from image to image (`cached`), and images
        suffice for all threads; else the threads share each step. Given are the images that a task
        of a product takes.
        """
        start, images = len(self.steps), x.shape[0]
        if not cached or 1 < images < 2 * self.threads:
            yield _EXCITATION_IMAGES
            return
        self.emit(Kind.IMAGES, {"x": x}, {})
        yield 1
        first = self.steps[start]
        assert isinstance(first, NativeStep)
        first.fields["steps"] = len(self.steps) - 1 - start
        self._together(start)

    def means(self, x: Map, geometry: Geometry, y: Map, sums: Sums | None = None) -> None:
        """y (N, taps · C): mean of what each tap sees of x, which may have been summed."""
        if sums is not None:
            self._means_of(sums, geometry, y)
            return
        N, H, W, C = x.shape
        rows = max(16, math.ceil(H * W * N / (4 * self.threads)))
        rows = min(rows, H * W)
        blocks = math.ceil(H * W / rows)
        parts = new_map((N * blocks, 1, 1, C))
        self.emit(Kind.SUMS, {"x": x, "sums": parts}, {"rows": rows})
        self._means_of(Sums(x, parts, blocks), geometry, y)

    def _means_of(self, sums: Sums, geometry: Geometry, y: Map) -> None:
        """y (N, taps · C): mean of what each tap sees of the map that was summed."""
        x, parts = sums.y, sums.parts
        _, H, W, C = x.shape
        OH, OW = geometry.output(H, W)
        taps = geometry.kernel[0] * geometry.kernel[1]
        self.scratch = max(self.scratch, C * (2 * taps + 1))  # sums in float64, and a line
        self.emit(
            Kind.MEANS,
            {"x": x, "sums": parts, "y": y},
            geometry.fields() | {"sum_blocks": sums.blocks, "OH": OH, "OW": OW},
        )

    def gates(
        self,
        name: str,
        module: SqueezeGate,
        x: Map,
        y: Map,
        branches: Sequence[Map | Sums] = (),
    ) -> None:
        """The gates y (N,C) of an SE block that `native_gate` accepts.

        `branches` are the parts of a concatenated x, summed or not.
        """
        weights = module.weight1.numel() + module.weight2.numel()
        with self.excitation_of(x, weights <= CACHED_WEIGHTS) as images:
            self._gates(name, module, x, y, branches, images)

    def _gates(
        self,
        name: str,
        module: SqueezeGate,
        x: Map,
        y: Map,
        branches: Sequence[Map | Sums],
        images: int,
    ) -> None:
        """`gates` with so many images a task of the products."""
        geometry = Geometry()
        if module.geometry is not None:
            kernel, padding, dilation = module.geometry
            geometry = Geometry(kernel, (1, 1), padding, dilation)
        N, depth = x.shape[0], module.weight1.shape[1]
        squeezed = new_map((N, 1, 1, depth))
        hidden = new_map((N, 1, 1, module.weight1.shape[0]))
        if not branches:
            self.means(x, geometry, squeezed)
        channel = 0
        for branch in branches:
            channels = (branch.y if isinstance(branch, Sums) else branch).shape[3]
            target = Map(squeezed.buffer, (N, 1, 1, channels), squeezed.ld, channel)
            if isinstance(branch, Sums):
                self._means_of(branch, geometry, target)
            else:
                self.means(branch, geometry, target)
            channel += channels
        gate = Ending(_GATES[module.gate_name])
        for part, weight, bias, source, target, last in (
            ("fc1", module.weight1, module.bias1, squeezed, hidden, ending(RELU)),
            ("fc2", module.weight2, module.bias2, hidden, y, gate),
        ):
            packed = self._matrix(f"{name}.{part}", weight, bias)
            self._excite(source, target, packed, last, images)

    def excitation(self, name: str, module: FusedConv, x: Map, y: Map, images: int) -> None:
        """y = δ(W x + b) for vectors, summed in float64, with so many images a task."""
        weight = module.weight.flatten(1)
        last = self._ending(name, module, y.shape[3])
        self._excite(x, y, self._matrix(name, weight, module.bias), last, images)

    def _excite(
        self, x: Map, y: Map, packed: tuple[Tensor, Tensor], last: Ending, images: int
    ) -> None:
        self.emit(
            Kind.EXCITATION,
            {"x": x, "y": y},
            {**last.fields, "images": images},
            {"weights": packed[0], "bias": packed[1], **last.constants},
        )

    def pointwise(
        self,
        name: str,
        module: Pointwise,
        x: Map,
        y: Map,
        gates: Map | None = None,
        shortcut: Map | None = None,
    ) -> None:
        """y = δ(gates ⊙ f·(a·x + b) + shortcut)."""
        constants: dict[str, Tensor] = {}
        if module.scale is not None and module.offset is not None:
            scale, offset = module.scale, module.offset
            constants["weights"] = self.constant((name, "a"), lambda: scale * module.factor)
            constants["bias"] = self.constant((name, "b"), lambda: offset * module.factor)
        elif module.factor != 1:
            constants["weights"] = self.constant(
                (name, "a"), lambda: torch.full((x.shape[3],), module.factor)
            )
        last = self._ending(name, module, x.shape[3])
        self._pass(x, y, last, constants, gates=gates, shortcut=shortcut)

    def copy(
        self, x: Map, y: Map, *, activation: Activation = LINEAR, shortcut: Map | None = None
    ) -> None:
        """y = δ(x + shortcut), with either left out."""
        self._pass(x, y, ending(activation), shortcut=shortcut)

    def shuffle(self, x: Map, y: Map, groups: int) -> None:
        """y: the channels of groups of x in turns; y has no gaps between pixels.

        Each pixel is read as an image's row of C / groups pixels with a channel for each group.
        """
        N, H, W, C = x.shape
        each = C // groups
        fields = {"N": N, "H": H * W, "W": each, "C": groups, "y_ld": groups}
        self.emit(Kind.INPUT, {"x": x, "y": y}, fields)
        step = self.steps[-1]
        assert isinstance(step, NativeStep)
        step.strides = (H * W * x.ld, each, x.ld, 1)

    def pool(self, x: Map, y: Map, geometry: Geometry, *, largest: bool, padding: bool) -> None:
        """Maximum or mean of windows; `padding`: whether padding counts in a mean."""
        kind = Kind.MAX_POOL if largest else Kind.AVERAGE_POOL
        self.emit(kind, {"x": x, "y": y}, geometry.fields() | {"counts_padding": int(padding)})
