"""Which algorithm a convolution takes and how its work is cut into tasks.

All of it follows from shapes, the instruction set and the number of threads, so that the same
network on the same machine always computes the same numbers. The limits were measured
(benchmarks/inference.py; docs/deployment.md has the figures).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from senet.inference import kernels
from senet.kernels.structs import Limit

# Bytes of inputs that a task reads again for each panel of weights: half of a small L2 cache.
_BLOCK_BYTES = 256 << 10
# Outputs of a group up to which gathered patches are too seldom read again.
_FEW_OUTPUTS = 64
# Bytes of a group's rows that a convolution slides over, in the first-level cache.
_COPIED_BYTES = 24 << 10
# Bytes of a task's Winograd patches, which are all read for each panel.
_PATCH_BYTES = 384 << 10
# Up to this many bytes all inputs stay in a core's cache and threads share the panels instead.
_SHARED_BYTES = 1 << 20
# Tasks for each thread, so that one that is held up leaves its rest to the other ones; and fewer
# where there is little to do.
_TASKS, _FEW_TASKS = 4, 2
# Products of a step that is not worth waiting for a second thread.
_SMALL = 1 << 14


@dataclass(frozen=True)
class Geometry:
    """A convolution's numbers, all along height and width.

    Attributes:
        kernel: size of the kernel.
        stride: its steps.
        padding: zeros around the input.
        dilation: distance of its taps.
        groups: its groups.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output(self, H: int, W: int) -> tuple[int, int]:
        """Height and width of the output for an input (H,W)."""
        sizes = []
        for axis, size in enumerate((H, W)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            sizes.append((size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    @property
    def in_place(self) -> bool:
        """Whether each output pixel is made of the input pixel at the same place."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    def fields(self) -> dict[str, int]:
        """As fields of a `Step`."""
        pairs = {
            "kernel": self.kernel,
            "stride": self.stride,
            "pad": self.padding,
            "dilation": self.dilation,
        }
        heights = {f"{key}_h": pair[0] for key, pair in pairs.items()}
        widths = {f"{key}_w": pair[1] for key, pair in pairs.items()}
        return heights | widths | {"groups": self.groups}


def row_stride(width: int) -> int:
    """Floats between rows of scratch maps, `row_stride` of geometry.h."""
    return (width + 15) // 32 * 32 + 16


def whole_tiles(rows: float) -> int:
    """Rows rounded down to whole register tiles, at least one tile."""
    return max(1, int(rows) // kernels.TILE_ROWS) * kernels.TILE_ROWS


@dataclass(frozen=True)
class Tasks:
    """Rows (Winograd: tiles) and panels of a task, and the scratch floats that it needs."""

    rows: int
    panels: int
    scratch: int = 0


def convolution_tasks(
    images: int, rows: int, depth: int, panels: int, in_place: bool, threads: int
) -> Tasks:
    """The tasks of a matrix product.

    Args:
        images: parts whose rows must not share a task.
        rows: rows of each.
        depth: products per output.
        panels: panels of weights over all groups.
        in_place: whether rows are read where they lie, and not gathered first.
        threads: threads.
    """
    inputs, weights = 4 * depth * rows, 4 * depth * panels * kernels.PANEL
    few = images == 1 and inputs <= _SHARED_BYTES and weights > inputs // 4
    if few and rows * depth * panels * kernels.PANEL <= _SMALL:
        task_rows, task_panels = rows, panels
    elif few and (threads == 1 or rows < 3 * kernels.TILE_ROWS * threads):
        # each thread reads its own weights only
        share = math.ceil(panels / (threads * _TASKS if in_place else threads))
        task_rows, task_panels = rows, share
        if in_place and rows > 2 * kernels.TILE_ROWS and panels % threads and panels < 4 * threads:
            task_rows = math.ceil(rows / 2)  # else one thread had a panel more
    elif few:  # its own rows, which it has in its cache from the step before
        task_rows, task_panels = math.ceil(rows / (threads * _FEW_TASKS)), panels
    else:
        fitting = whole_tiles(_BLOCK_BYTES / (4 * depth))
        balanced = whole_tiles(math.ceil(images * rows / (threads * _TASKS)))
        task_rows, task_panels = min(fitting, balanced), panels
    scratch = 0 if in_place else min(task_rows, rows) * row_stride(depth)
    return Tasks(task_rows, task_panels, scratch)


def winograd_tile(geometry: Geometry, C: int, OC: int, H: int, W: int) -> int:
    """Outputs along the side of a Winograd tile; 0 where the direct way is better."""
    if geometry.kernel != (3, 3) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return 0
    if geometry.groups != 1 or not 16 <= C <= Limit.CHANNELS or OC < 16:
        return 0
    height, width = geometry.output(H, W)
    cost = {}
    for tile in (2, 4):
        tiles = math.ceil(height / tile) * math.ceil(width / tile)
        cost[tile] = tiles * (tile + 2) ** 2
    best = min(cost, key=lambda tile: cost[tile])
    return best if cost[best] < 0.7 * 9 * height * width else 0


def depthwise_tasks(geometry: Geometry, N: int, OH: int, OW: int, C: int, threads: int) -> Tasks:
    """Rows of an image's output and panels of channels of a depthwise convolution's tasks.

    Channels are shared out first where images do not suffice: rows share inputs with each other.
    """
    panels, wanted = math.ceil(C / kernels.PANEL), threads * _TASKS
    row_bytes = 4 * OW * C * geometry.stride[0] * geometry.stride[1]
    if OW * C * geometry.kernel[0] * geometry.kernel[1] * OH * N <= _SMALL:
        return Tasks(OH, panels, 0)
    if N == 1 and 3 * kernels.TILE_ROWS * threads <= OH * OW:  # as a product of so few rows
        return Tasks(math.ceil(OH / (threads * _FEW_TASKS)), panels, 0)
    rows = min(OH, max(geometry.kernel[0], _BLOCK_BYTES // row_bytes))
    parts = min(panels, math.ceil(wanted / (N * math.ceil(OH / rows))))
    if N * math.ceil(OH / rows) * parts < wanted:
        rows = max(1, OH // math.ceil(wanted / (N * parts)))
    return Tasks(rows, math.ceil(panels / parts), 0)


def slides(geometry: Geometry, C: int, OC: int) -> bool:
    """Whether a convolution's outputs are too few for gathering patches: it slides over rows."""
    if geometry.dilation != (1, 1) or geometry.kernel == (1, 1):
        return False
    narrow = OC // geometry.groups <= _FEW_OUTPUTS
    return narrow and (geometry.groups > 1 or C <= 4)


def pairs_groups(geometry: Geometry, C: int, OC: int) -> bool:
    """Whether groups of a convolution that `slides` fill vectors better two by two."""
    lanes, inputs, outputs = kernels.PANEL // 2, C // geometry.groups, OC // geometry.groups
    suits = outputs == lanes or (outputs > lanes and outputs % lanes == lanes // 2)
    return geometry.groups > 1 and suits and max(inputs, outputs) <= 40 and slides(geometry, C, OC)


def sliding_tasks(
    geometry: Geometry, N: int, OH: int, OW: int, C: int, panels: int, threads: int
) -> Tasks:
    """Rows of an image's output and panels of weights of the tasks of one that `slides`.

    Args:
        geometry: the convolution, its groups as they are packed.
        N: images.
        OH: height of the output.
        OW: width of the output.
        C: channels of a group's input.
        panels: panels of weights over all groups.
        threads: threads.
    """
    wanted, width = threads * _TASKS, (OW - 1) * geometry.stride[1] + geometry.kernel[1]
    fitting = _COPIED_BYTES // (4 * width * C * geometry.stride[0])
    rows = min(OH, max(geometry.kernel[0], fitting))
    parts = min(panels, math.ceil(wanted / (N * math.ceil(OH / rows))))
    if N * math.ceil(OH / rows) * parts < wanted:
        rows = max(1, OH // math.ceil(wanted / (N * parts)))
    return Tasks(rows, math.ceil(panels / parts), sliding_floats(geometry, OW, C, rows))


def sliding_floats(geometry: Geometry, OW: int, C: int, rows: int) -> int:
    """Floats of the copy of a group's rows for so many rows of the output."""
    width = (OW - 1) * geometry.stride[1] + geometry.kernel[1]
    return ((rows - 1) * geometry.stride[0] + geometry.kernel[0]) * width * C + kernels.PANEL


def narrow_groups(geometry: Geometry, C: int, OC: int) -> bool:
    """Whether a 3×3 convolution's groups are narrower than a vector."""
    if geometry.kernel != (3, 3) or geometry.dilation != (1, 1) or OC != C or C > Limit.CHANNELS:
        return False
    lanes = kernels.PANEL // 2
    width = C // geometry.groups
    return geometry.stride in ((1, 1), (2, 2)) and width in (2, 4, 8) and 8 <= lanes >= width


def winograd_tasks(tile: int, tiles: int, C: int, panels: int, threads: int) -> tuple[Tasks, bool]:
    """The tasks of a Winograd convolution; whether patches come first, for all threads."""
    points, ld = (tile + 2) ** 2, row_stride(C)
    patches, weights = 4 * points * tiles * ld, 4 * points * C * panels * kernels.PANEL
    if weights > patches and panels >= threads:
        rows = math.ceil(tiles / (threads * _TASKS))
        share = math.ceil(panels / (threads * _TASKS))
        return Tasks(rows, share, points * tiles * kernels.PANEL), True
    fitting = whole_tiles(_PATCH_BYTES / (4 * points * ld))
    rows = min(fitting, whole_tiles(math.ceil(tiles / (threads * _TASKS))))
    return Tasks(rows, panels, points * rows * (ld + kernels.PANEL)), False
