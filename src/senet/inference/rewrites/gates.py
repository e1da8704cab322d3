"""SE blocks by what they compute: a map times something that depends on maps only through
reductions over all their positions.

Means become nn.AdaptiveAvgPool2d(1), layers on the squeezed vectors 1×1 convolutions on
(N,C,1,1), and the product a `Pointwise` with gates. Two layers behind the mean of a convolution
without activation become a `SqueezeGate`: their squeeze is taken before the convolution. Networks
of one spatial dimension have maps (N,C,L) and vectors (N,C,1).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.inference.modules import Across, FusedConv, Pointwise, SqueezeGate, ends_openly
from senet.inference.rewrites.activations import is_scalar
from senet.inference.rewrites.editor import Editor, plain
from senet.nn.block import GlobalSqueeze, SqueezeExcitation
from senet.ops.activations import RELU, Activation

_PRODUCTS = ("mul", "multiply")
# What moves the numbers of a vector and leaves their order.
_SHAPING = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten")
_TURNING = ("transpose", "swapaxes", "permute")
_SPREADING = ("expand", "expand_as", "broadcast_to")
_MAXIMA = ("adaptive_max_pool1d", "adaptive_max_pool2d", "amax")
_GATES = {"sigmoid": "sigmoid", "hardsigmoid": "hard_sigmoid", "tanh": "tanh", "relu": "relu"}


POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


def means(edit: Editor) -> None:
    """Make an nn.AdaptiveAvgPool2d(1) of each mean over all positions of a map (N,C,H,W)."""
    kind = dict(enumerate(POOLS, 1)).get(edit.dims)
    if kind is None:
        return
    for node in list(edit.graph.nodes):
        source = node.args[0] if node.args else None
        shape = edit.shape(source)
        if not isinstance(source, fx.Node) or shape is None or not _is_mean(edit, node, shape):
            continue
        found = edit.shape(node)
        if len(shape) == 3 and edit.dims == 2:  # positions in one row
            source = source.args[0]
            assert isinstance(source, fx.Node)
            shape = edit.shape(source) or ()
        pool = edit.insert(kind(1), node, (source,), edit.name_of(node))
        edit.results[pool] = _vector(edit, *shape[:2])
        new = pool
        if found is not None and len(found) < len(edit.shape(pool) or ()):
            new = _flattened(edit, pool, node, len(found) - 1)
        edit.replace(node, new)


def _pools(edit: Editor) -> tuple[type[nn.Module], ...]:
    """Layers that reduce the maps of a network."""
    found = {1: (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)}
    return found.get(edit.dims, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))


def _vector(edit: Editor, images: int, channels: int) -> Tensor:
    """Shape of vectors as maps of one position."""
    return torch.empty(images, channels, *ones(edit), device="meta")


def ones(edit: Editor) -> tuple[int, ...]:
    """Size of a map of one position."""
    return (1,) * edit.dims


def _flattened(edit: Editor, vector: fx.Node, at: fx.Node, first: int = 1) -> fx.Node:
    """A vector (N,C,1,1) with its dimensions from `first` on in one."""
    with edit.graph.inserting_before(at):
        return edit.graph.call_function(torch.flatten, (vector, first))


def _is_mean(edit: Editor, node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether a node is the mean over all positions of a map of that shape."""
    name = edit.operation(node)
    if name == "mean":
        dims = edit.argument(node, 1, "dim")
        dims = dims if isinstance(dims, list | tuple) else (dims,)
        if node.kwargs.get("dtype") is not None or not all(isinstance(d, int) for d in dims):
            return False
        places = sorted(d % len(shape) for d in dims)
        if len(shape) == edit.dims + 2:
            return places == list(range(2, len(shape)))
        if len(shape) == 3:
            return places == [2] and _positions_in_a_row(edit, node.args[0], shape)
        return False
    if len(shape) != edit.dims + 2 or node.op != "call_function":
        return False
    if name == f"adaptive_avg_pool{edit.dims}d":
        size = edit.argument(node, 1, "output_size")
        return size == 1 or (isinstance(size, list | tuple) and tuple(size) == ones(edit))
    if name == "avg_pool2d":  # with a window that is read from the map's size
        window = edit.argument(node, 1, "kernel_size")
        read = len(node.all_input_nodes) > 1 and len(node.args) + len(node.kwargs) == 2
        return (
            read
            and edit.shape(node) == (*shape[:2], 1, 1)
            and _read_from(edit, window, node.args[0])
        )
    return False


def _read_from(edit: Editor, window: Any, source: Any) -> bool:
    """Whether a window is the last two sizes of a node, whatever they are."""
    if isinstance(window, fx.Node) and edit.operation(window) == "getitem":
        sizes, part = window.args
        return part in (slice(2, None), slice(-2, None)) and _sizes_of(edit, sizes, source)
    if isinstance(window, list | tuple) and len(window) == 2:
        places = [_place(edit, one, source) for one in window]
        return places in ([2, 3], [-2, -1])
    return False


def _sizes_of(edit: Editor, node: Any, source: Any) -> bool:
    if not isinstance(node, fx.Node) or not node.args or node.args[0] is not source:
        return False
    shape = edit.operation(node) == "getattr" and node.args[1] == "shape"
    return bool(shape or (edit.operation(node) == "size" and len(node.args) == 1))


def _place(edit: Editor, node: Any, source: Any) -> int | None:
    """Which size of `source` a node is."""
    if not isinstance(node, fx.Node):
        return None
    name, args = edit.operation(node), node.args
    if name == "size" and len(args) == 2 and args[0] is source and isinstance(args[1], int):
        return args[1]
    if name == "getitem" and isinstance(args[1], int) and _sizes_of(edit, args[0], source):
        return args[1]
    return None


def _positions_in_a_row(edit: Editor, node: Any, shape: tuple[int, ...]) -> bool:
    """Whether a node (N,C,P) is a map (N,C,H,W) whose positions were put in a row."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    module = edit.called(node)
    moved = edit.operation(node) in ("view", "reshape", "flatten") or type(module) is nn.Flatten
    before = edit.shape(node.args[0])
    if not moved or before is None or len(before) != 4:
        return False
    return bool(before[:2] == shape[:2] and before[2] * before[3] == shape[2])


class Vectors:
    """Which nodes depend on maps only through reductions over all positions.

    Args:
        edit: the graph.
    """

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.known: dict[fx.Node, bool] = {}
        self.four: dict[fx.Node, fx.Node] = {}
        for node in edit.graph.nodes:
            self.known[node] = self._is_vector(node)

    def _is_vector(self, node: fx.Node) -> bool:
        module = self.edit.called(node)
        if module is not None and type(module) in _pools(self.edit):
            size: object = module.output_size
            return size in (1, (1,), (1, 1))
        if self.edit.operation(node) in _MAXIMA and node.args:
            shape, before = self.edit.shape(node), self.edit.shape(node.args[0])
            rank = self.edit.dims + 2
            whole = before is not None and len(before) == rank and self._takes_all(node)
            return bool(whole and shape is not None and shape[2:] in ((), ones(self.edit)))
        sources = [n for n in node.all_input_nodes if self._is_tensor(n)]
        if node.op not in ("call_module", "call_function", "call_method") or not sources:
            return False
        result = self.edit.results.get(node)
        parts = result if isinstance(result, tuple | list) else (result,)
        return all(isinstance(part, Tensor) for part in parts) and all(map(self.is_vector, sources))

    def _takes_all(self, node: fx.Node) -> bool:
        """Whether a maximum is over all positions."""
        edit = self.edit
        size = edit.argument(node, 1, "output_size", edit.argument(node, 1, "dim"))
        if edit.operation(node) != "amax":
            return size in (1, (1,), [1], (1, 1), [1, 1])
        axes = size if isinstance(size, list | tuple) else (size,)
        if not all(isinstance(axis, int) for axis in axes):
            return False
        rank = edit.dims + 2
        return sorted(axis % rank for axis in axes) == list(range(2, rank))

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether a node is no size and no constant."""
        return self.edit.constant(node) is None and not isinstance(
            self.edit.results.get(node), int | torch.Size
        )

    def is_vector(self, node: Any) -> bool:
        """Whether a node depends on maps through reductions only."""
        return isinstance(node, fx.Node) and self.known.get(node, False)

    def gates(self, node: fx.Node, shape: tuple[int, ...], at: fx.Node) -> fx.Node | None:
        """A node (N,C,1,1) with the numbers of `node`, which multiply a map of `shape`.

        Or (N,C,1), for maps (N,C,L).
        New nodes come before `at`.
        """
        edit = self.edit
        while edit.operation(node) in _SPREADING and self.is_vector(node.args[0]):
            node = node.args[0]  # type: ignore[assignment]
        if not self.is_vector(node):
            return None
        if edit.shape(node) != (*shape[:2], *ones(edit)):
            return None
        return self.as_map(node, at) or node

    def as_map(self, node: Any, at: fx.Node) -> fx.Node | None:
        """The same numbers as a node (N,C,1,1), with layers as convolutions; None: impossible."""
        if not self.is_vector(node):
            return None
        if node not in self.four:
            made = self._as_map(node, at)
            if made is None:
                return None
            self.four[node] = made
        return self.four[node]

    def _as_map(self, node: fx.Node, at: fx.Node) -> fx.Node | None:
        edit, shape = self.edit, self.edit.shape(node)
        channels = _numbers(shape)
        if shape is None or channels is None:
            return None
        module = edit.called(node)
        if type(module) in _pools(edit):
            return node
        if _only_shapes(edit, node):
            source = node.args[0]
            before = edit.shape(source)
            same = before is not None and before[0] == shape[0] and _numbers(before) == channels
            return self.as_map(source, at) if same else None
        if not node.args or node.kwargs:
            return None
        linear = isinstance(module, nn.Linear) and plain(module) and len(shape) == 2
        across = _is_across(module, shape)
        if isinstance(module, FusedConv):
            known = tuple(module.weight.shape[2:]) == (1, 1) and module.unpadded
            known = known and module.dims == edit.dims
        else:
            known = isinstance(module, Pointwise) or is_scalar(edit, node)
            known = known and all(edit.shape(n) == shape for n in node.all_input_nodes)
        if not linear and not across and not known:
            return None
        args = [self.as_map(a, at) if isinstance(a, fx.Node) else a for a in node.args]
        if any(
            isinstance(a, fx.Node) and new is None for a, new in zip(node.args, args, strict=True)
        ):
            return None
        if linear:
            assert isinstance(module, nn.Linear)
            layer: nn.Module = as_convolution(module, edit.dims)
            made = edit.insert(layer, at, tuple(args), edit.name_of(node))
        elif across:
            assert isinstance(module, FusedConv)
            layer = Across(copy.deepcopy(module))
            made = edit.insert(layer, at, tuple(args), edit.name_of(node))
        elif args == list(node.args):
            return node
        elif isinstance(module, FusedConv | Pointwise):  # not shared: it may take in more
            made = edit.insert(copy.deepcopy(module), at, tuple(args), edit.name_of(node))
        else:
            with edit.graph.inserting_before(at):
                made = edit.graph.create_node(node.op, node.target, tuple(args))
            edit.origin[made] = edit.name_of(node)
            edit.scopes[made] = edit.scopes.get(node, "")
        edit.results[made] = _vector(edit, shape[0], channels)
        self.known[made] = True
        self.four[made] = made
        return made


def _numbers(shape: tuple[int, ...] | None) -> int | None:
    """How many numbers an image's vector has, in whatever dimension; None of anything else."""
    if shape is None or len(shape) < 2 or sum(size != 1 for size in shape[1:]) > 1:
        return None
    return math.prod(shape[1:])


def _is_across(module: nn.Module | None, shape: tuple[int, ...]) -> bool:
    """Whether a module that gives `shape` is a convolution over the channels of a row (N,1,C)."""
    if not isinstance(module, FusedConv) or module.dims != 1 or len(shape) != 3 or shape[1] != 1:
        return False
    one = module.weight.shape[:2] == (1, 1)
    return one and module.output_size(1, shape[2]) == (1, shape[2]) and module.stride == (1, 1)


def _only_shapes(edit: Editor, node: fx.Node) -> bool:
    """Whether a node of vectors may change their dimensions, and not the order of their numbers."""
    if not node.args:
        return False
    if type(edit.called(node)) in (nn.Flatten, nn.Unflatten):
        return True
    if edit.operation(node) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(part in (slice(None), None, Ellipsis, 0) for part in index)
    if edit.operation(node) in _TURNING:
        first, *rest = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        axes = (0, first, *rest) if edit.operation(node) != "permute" else (first, *rest)
        rank = len(edit.shape(node) or ())
        images = isinstance(axes[0], int) and axes[0] == 0
        others = all(isinstance(axis, int) and axis % rank for axis in axes[1:])
        return images and others and _numbers(edit.shape(node)) is not None
    return edit.operation(node) in _SHAPING


def as_convolution(linear: nn.Linear, dims: int = 2) -> FusedConv:
    """A fully connected layer as a 1×1 convolution of so many spatial dimensions."""
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    conv = kind(
        linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta"
    )
    conv.weight = nn.Parameter(linear.weight.reshape(*linear.weight.shape, *(1,) * dims), False)
    if linear.bias is not None:
        conv.bias = nn.Parameter(linear.bias, False)
    return FusedConv(conv)


def products(edit: Editor) -> None:
    """Make a `Pointwise` with gates of each map times a vector."""
    if edit.dims not in (1, 2):
        return
    vectors = Vectors(edit)
    for node in list(edit.graph.nodes):
        _flatten(edit, vectors, node)
        if edit.operation(node) not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
            continue
        shape = edit.shape(node)
        if shape is None or len(shape) != edit.dims + 2:
            continue
        for scaled, factor in (node.args, node.args[::-1]):
            if not isinstance(scaled, fx.Node) or not isinstance(factor, fx.Node):
                continue
            if vectors.is_vector(scaled) or edit.shape(scaled) != shape:
                continue
            if not edit.in_floats(node, scaled):
                continue
            gates = vectors.gates(factor, shape, node)
            if gates is not None:
                block = edit.scopes.get(node, "")
                new = edit.insert(Pointwise(), node, (scaled, gates), block or node.name)
                edit.gated.append(block)
                edit.say(new, "scale in one pass")
                vectors.known[new] = False
                edit.replace(node, new)
                break


def _flatten(edit: Editor, vectors: Vectors, node: fx.Node) -> None:
    """Make a torch.flatten of whatever takes the last dimensions off a vector (N,C,1,1)."""
    source: Any = node
    while vectors.is_vector(source) and _only_shapes(edit, source):
        source = source.args[0]
    before = edit.shape(source)
    if source is node or not vectors.is_vector(source) or before is None:
        return
    if before[2:] != ones(edit):
        return
    if edit.shape(node) == before[:2]:
        new = _flattened(edit, source, node)
        vectors.known[new] = True
        edit.replace(node, new)


def own_blocks(edit: Editor) -> None:
    """Take this package's SE blocks apart, which torch.fx does not look into."""
    for node in list(edit.graph.nodes):
        se = edit.called(node)
        if type(se) is not SqueezeExcitation or len(node.args) != 1 or node.kwargs:
            continue
        name, source = str(node.target), node.args[0]
        why_not = obstacle(se, edit.dims)
        if why_not is not None:
            edit.left.append((name, why_not))
            continue
        assert isinstance(source, fx.Node)
        edit.gated.append(name)
        conv = edit.called(source)
        alone = edit.single_use(source) and edit.may_move(source, node)
        if isinstance(conv, FusedConv) and commutes(conv) and alone:
            gates = edit.insert(SqueezeGate(se, conv), node, source.args[:1], name)
            new = edit.move(source, node, (source.args[0], gates))
            edit.say(new, f"squeeze of {name} before the convolution, scale in the same pass")
        else:
            gates = edit.insert(SqueezeGate(se), node, (source,), name)
            new = edit.insert(Pointwise(), node, (source, gates), name)
            edit.say(new, "scale in one pass")
            edit.replace(node, new)


def squeeze_first(edit: Editor) -> None:
    """Take the squeeze before a convolution whose output is only squeezed and scaled."""
    for node in list(edit.graph.nodes):
        if node not in edit.graph.nodes:
            continue
        product = edit.called(node)
        if not isinstance(product, Pointwise) or len(node.args) != 2:
            continue
        source, gates = node.args
        conv = edit.called(source)
        assert isinstance(source, fx.Node)
        if not isinstance(conv, FusedConv) or not ends_openly(conv) or len(source.args) != 1:
            continue
        if product.scale is not None or product.factor != 1 or product.slopes is not None:
            continue
        if not edit.may_move(source, node):
            continue
        if edit.single_use(source):  # gates of something else
            conv.activation = product.activation
            new = edit.move(source, node, (source.args[0], gates))
            edit.say(new, "scale in the same pass")
            continue
        if not commutes(conv):
            continue
        layers = _two_layers(edit, gates)
        if layers is None or set(source.users) != {node, layers[0]}:
            continue
        _, first, last = layers
        name = edit.name_of(node)
        se = _block(edit.called(first), edit.called(last))
        new_gates = edit.insert(SqueezeGate(se, conv), source, source.args[:1], name)
        node.args = (source, new_gates)
        for spent in (last, first, layers[0]):
            edit.graph.erase_node(spent)
        conv.activation = product.activation
        new = edit.move(source, node, (source.args[0], new_gates))
        edit.say(new, f"squeeze of {name} before the convolution, scale in the same pass")


def _two_layers(edit: Editor, gates: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The mean, and the two layers behind it that nothing else reads."""
    found: list[fx.Node] = []
    node = gates
    for kind in (FusedConv, FusedConv, POOLS):
        module = edit.called(node)
        if not isinstance(module, kind) or not edit.single_use(node) or len(node.args) != 1:
            return None
        if isinstance(module, FusedConv):
            if tuple(module.weight.shape[1:]) != (module.weight.shape[1], 1, 1):
                return None
            if module.groups != 1 or module.slopes is not None or not module.unpadded:
                return None
        found.append(node)
        node = node.args[0]
    last, first, pool = found
    return pool, first, last


def _block(first: Any, last: Any) -> SqueezeExcitation:
    """An SE block of two layers that are given as 1×1 convolutions."""
    hidden, channels = first.weight.shape[:2]
    gate = _GATES.get(last.activation.name)
    se = SqueezeExcitation(
        channels,
        hidden=hidden,
        activation=nn.ReLU if first.activation == RELU else lambda: _alone(first.activation),
        gate=_alone(last.activation) if gate is None else gate,  # type: ignore[arg-type]
        device="meta",
    )
    for layer, conv in ((se.fc1, first), (se.fc2, last)):
        layer.weight = nn.Parameter(conv.weight.flatten(1), False)
        layer.bias = nn.Parameter(conv.bias, False)
    return se


def _alone(activation: Activation) -> Pointwise:
    module = Pointwise()
    module.activation = activation
    return module


def obstacle(se: SqueezeExcitation, dims: int) -> str | None:
    """Why the gates of an SE block cannot be computed from its weights, or None if they can.

    Args:
        se: the block.
        dims: spatial dimensions of the network's input.
    """
    if se.dims != dims or dims > 2:
        return f"it takes {se.dims} spatial dimensions"
    squeeze: nn.Module = se.squeeze
    if not isinstance(squeeze, GlobalSqueeze):
        return f"its squeeze is a {type(squeeze).__name__}"
    if squeeze.method != "avg":
        return f"squeeze={squeeze.method!r}"
    for name in ("fc1", "fc2"):
        layer = getattr(se, name)
        if not plain(layer):
            return f"its {name} is a {type(layer).__name__}"
    return None


def commutes(conv: FusedConv) -> bool:
    """Whether a mean may be taken before this convolution instead of behind it.

    With stride the input would be larger than the output: nothing to gain.
    """
    even = conv.padding == conv.behind and not conv.same
    return ends_openly(conv) and even and conv.groups == 1 and conv.stride == (1, 1)
