"""Taking the product of an SE block out of a module that computes more than the block.

Code inside of a `forward` has no module that could be replaced, but torch.fx turns the module
around it into a graph, whose product goes or gets constants; what only served the gates goes too.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from senet.anatomy.graph import Trace, function_name
from senet.anatomy.occurrences import Occurrence, container
from senet.anatomy.recording import evaluating

_KEPT = ("config", "input_size", "min_input_size", "classes")


@dataclass(frozen=True)
class Product:
    """A product in the graph of a module.

    Attributes:
        module: dotted name of the module.
        child: name in the module of the submodule that is the product; "" where it is an operation.
        number: which product of the module's own code it is, from 0.
        factor: position of the gates among the arguments.
    """

    module: str
    child: str
    number: int
    factor: int


class _Shallow(fx.Tracer):
    """Follows the code of one module and calls all of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def product_of(model: nn.Module, trace: Trace, block: Occurrence) -> Product | str:
    """Where a block's product stands in the graph of the module around it; or why nowhere."""
    call = container(block)
    inner = block.product.calls
    depth = inner.index(call)
    child, number = "", 0
    if len(inner) > depth + 1:
        step = inner[depth + 1]
        if step.output is not block.product or len(inner) > depth + 2:
            return f"its product is inside of {step.name}, its squeeze is not"
        child = step.name.removeprefix(f"{call.name}.")
    else:
        own = [n for n in trace.nodes if n.site is not None and n.calls[-1] is call]
        number = own.index(block.product)
    found = Product(call.name, child, number, block.product.inputs.index(block.factor))
    try:
        _find(_graph(model.get_submodule(call.name)), found)
    except (fx.proxy.TraceError, LookupError, TypeError, NameError, AttributeError) as error:
        name = call.name or type(call.module).__name__
        return f"{name} cannot be rewritten: {str(error).splitlines()[0]}"
    return found


def replace_product(model: nn.Module, product: Product, scale: Tensor | None) -> nn.Module:
    """Take a product out, or give it constants.

    Args:
        model: changed in place.
        product: of `product_of`, for this model or an equal one.
        scale: what takes the gates' place; None for nothing: the map goes on as it is.

    Returns:
        The model; another object where the product stands in its own code.
    """
    module = model.get_submodule(product.module)
    graph = _graph(module)
    node = _find(graph, product)
    traced = module if isinstance(module, fx.GraphModule) else None
    if traced is None:
        traced = fx.GraphModule(module, graph, type(module).__name__)
        for name in _KEPT:
            if hasattr(module, name):
                setattr(traced, name, getattr(module, name))
    if scale is None:
        node.replace_all_uses_with(node.args[1 - product.factor])  # type: ignore[arg-type]
        graph.erase_node(node)
    else:
        number = 0
        while hasattr(traced, f"scale_{number}"):
            number += 1
        traced.register_buffer(f"scale_{number}", scale)
        with graph.inserting_before(node):
            constant = graph.get_attr(f"scale_{number}")
        node.update_arg(product.factor, constant)
    graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    if not product.module:
        return traced
    model.set_submodule(product.module, traced)
    return model


def _graph(module: nn.Module) -> fx.Graph:
    if isinstance(module, fx.GraphModule):
        return module.graph
    with evaluating(module):
        return _Shallow().trace(module)


def _find(graph: fx.Graph, product: Product) -> fx.Node:
    """The node of a product.

    Raises:
        LookupError: there is none.
    """
    if product.child:
        nodes = [n for n in graph.nodes if n.op == "call_module" and n.target == product.child]
        number = 0
    else:
        nodes = [n for n in graph.nodes if _multiplies(n)]
        number = product.number
    if number >= len(nodes):
        raise LookupError("its graph has fewer products than it computes")
    return nodes[number]


def _multiplies(node: fx.Node) -> bool:
    name: Any = node.target
    if node.op == "call_function":
        name = function_name(node.target).strip("_").removeprefix("i")
    two = len(node.args) == 2 and all(isinstance(value, fx.Node) for value in node.args)
    return (
        node.op in ("call_function", "call_method") and two and name in ("mul", "mul_", "multiply")
    )
