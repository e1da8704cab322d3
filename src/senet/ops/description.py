"""An operator from its description: what it takes, gives, keeps and differentiates, each by name.

A `Description` names the fields once, in named tuples. `Operator` makes of it the schemas of
`senet::NAME` and `senet::NAME_backward`, their fake tensors, gradients, autocast and flops, and the
three ways in which a call runs:

- *direct*: kernels without the dispatcher, for eager calls that nobody observes;
- *dispatched*: `senet::NAME`, opaque to torch.compile and torch.export, one node of the graph that
  calls the kernels which take its tensors, and the algebra where none does;
- *transparent*: the algebra under a `torch.autograd.Function` that torch.compile looks into.

`torch.library.custom_op` and `register_autograd` would do some of this, at 0.1 ms more a call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

A = TypeVar("A", bound=tuple[Any, ...])  # arguments of an operator
O = TypeVar("O", bound=tuple[Any, ...])  # its outputs  # noqa: E741
S = TypeVar("S", bound=tuple[Any, ...])  # what its backward pass takes

# The weight of the batch in the running statistics of each normalization; None leaves them.
Momenta = Sequence[float | None]

NO_DOUBLE_BACKWARD = (
    "senet::…_backward has no derivative of its own; call the functions of senet.ops, which have "
    'derivatives of any order, or wrap the forward pass in `with senet.ops.use("reference"):`'
)

_LIBRARY = torch.library.Library("senet", "DEF")
_OPERATORS: dict[str, Operator[Any]] = {}  # by the names of their descriptions
_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list[int]: "int[]",
    list[float]: "float[]",
}
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


class Algebra(Protocol):
    """A module with the closed form in plain PyTorch, which runs anywhere.

    Attributes:
        forward: (arguments) → outputs.
        backward: (gradient of y, saved, wanted) → gradients; nobody looks at unwanted ones.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Kernels(NamedTuple):
    """An implementation in kernels.

    Attributes:
        takes: whether they can run on a tensor.
        module: with `backward` as of `Algebra`, and `forward` (arguments, momenta) → outputs. It
            moves the running statistics by the momenta. These are None where the dispatcher calls:
            it moves nothing, and the results, which may otherwise lie in memory as `backward` likes
            it, are as `empty_outputs` makes them.
    """

    takes: Callable[[Tensor], bool]
    module: Algebra


def _passes_nothing(_: Any) -> None:
    return None


def _moves_nothing(*_: Any) -> None:
    return None


class Again(NamedTuple):
    """The operator's y once more, to be differentiated further.

    Attributes:
        arguments: whose reference gives y, or the part of it through which derivatives go.
        momenta: that move nothing.
        gradient: of that y.
        known: gradients that need no differentiation, by the names of arguments.
    """

    arguments: Any
    momenta: Momenta
    gradient: Tensor
    known: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Description(Generic[A, O, S]):
    """An operator.

    Attributes:
        name: of `senet::NAME`.
        arguments, outputs, saved: named tuples; the types of their fields make the schemas. Fields
            with tensors come first; all lists of tensors in one tuple have the same length. The
            first argument is the map, or the maps, whose place and type decide who computes; the
            first output is the result y, the others serve the backward pass.
        gradients: generic named tuple of the arguments that are differentiated, by their names:
            of bool for what is wanted, of tensors for the gradients.
        save: what the backward pass needs.
        empty_outputs, empty_gradients: uninitialized results, from what forward and backward take.
        save_again: small tensors that `again` needs beside what is saved.
        again: (saved, those tensors, the arguments' options, gradient of y) → what the reference
            computes again where the backward pass is differentiated itself.
        flops, backward_flops: the same from shapes instead of tensors (2 a multiply-add).
        move: moves the running statistics among the arguments, if there are any, by the momenta.
        passes: index into `gradients` of an argument whose gradient is that of y itself, if any.
        added: the last options, which programs that were exported before do not give: the schema
            has their defaults.
    """

    name: str
    arguments: type[A]
    outputs: type[O]
    saved: type[S]
    gradients: type[Any]
    save: Callable[[A, O], S]
    empty_outputs: Callable[[A], O]
    empty_gradients: Callable[[S, Any], Any]
    save_again: Callable[[A], tuple[Tensor | None, ...]]
    again: Callable[[S, Sequence[Tensor | None], Sequence[Any], Tensor], Again]
    flops: Callable[[Any], int]
    backward_flops: Callable[[Any, Any], int]
    move: Callable[[A, O, Momenta], None] = _moves_nothing
    passes: Callable[[A], int | None] = _passes_nothing
    added: Sequence[str] = ()


def move_running(
    mean: Tensor | None, var: Tensor | None, momentum: float | None, statistics: Tensor
) -> None:
    """Move running statistics by `momentum` towards rows 0 (mean) and 2 (unbiased variance)."""
    if momentum is None or mean is None or var is None:
        return
    with torch.no_grad():
        for running, row in ((mean, 0), (var, 2)):
            running.lerp_(statistics[row].to(running.dtype), momentum)


def _flat(values: Sequence[Any], lists: Sequence[bool]) -> tuple[Any, ...]:
    """The values one by one; `lists` tells which of them are lists, and is empty if none is."""
    if not lists:
        return tuple(values)
    pairs = zip(values, lists, strict=True)
    return tuple(t for value, is_list in pairs for t in (value if is_list else (value,)))


def _grouped(flat: Sequence[Any], lists: Sequence[bool]) -> tuple[Any, ...]:
    """The values of which `_flat` made `flat`: their lists have the same length."""
    if not lists:
        return tuple(flat)
    size = (len(flat) - lists.count(False)) // lists.count(True)
    values: list[Any] = []
    at = 0
    for is_list in lists:
        values.append(list(flat[at : at + size]) if is_list else flat[at])
        at += size if is_list else 1
    return tuple(values)


class _Fields:
    """A named tuple as the dispatcher and autograd take it: its tensors one by one, its options."""

    def __init__(self, cls: type[Any], added: Sequence[str] = ()) -> None:
        hints = get_type_hints(cls)
        self.cls, self.names = cls, cls._fields
        kinds = [_SCHEMA[hints[name]] for name in self.names]
        defaults = [
            f"={json.dumps(cls._field_defaults[n])}" if n in added else "" for n in self.names
        ]
        parts = zip(kinds, self.names, defaults, strict=True)
        self.schema = ", ".join(f"{kind} {name}{default}" for kind, name, default in parts)
        self.count = sum("Tensor" in kind for kind in kinds)
        assert all("Tensor" in kind for kind in kinds[: self.count])
        lists = tuple(kind.endswith("[]") for kind in kinds[: self.count])
        self.lists = lists if any(lists) else ()

    def split(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Tensors, options."""
        tensors, options = values[: self.count], values[self.count :]
        return _flat(tensors, self.lists) if self.lists else tensors, options

    def join(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> Any:
        """The named tuple of which these are the parts."""
        values = _grouped(tensors, self.lists) if self.lists else tensors
        return self.cls(*values, *options)  # the dispatcher leaves out the last defaults


def _returned(outputs: Sequence[Any]) -> Any:
    """Outputs as the dispatcher passes them: one alone is no tuple."""
    return outputs if len(outputs) > 1 else outputs[0]


def _taken(value: Any) -> Any:
    """What `_returned` was given."""
    return (value,) if isinstance(value, Tensor) else value


def differentiates(tensors: Sequence[Any]) -> bool:
    """Whether a gradient of one of these will be wanted."""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )


def _unobserved(tensors: Sequence[Any]) -> bool:
    """Whether nothing has to see the operator: no dispatch mode or subclass."""
    stack = torch._C._len_torch_dispatch_stack()
    return stack == 0 and _PLAIN.issuperset(map(type, tensors))


class Operator(Generic[A]):
    """A described operator and its implementations.

    Args:
        description: what it is.
        reference: (arguments, momenta) → y, the oracle.
        algebra: what runs anywhere.
        pytorch: as `reference`, by PyTorch's own functions; None where the algebra is that.
        kernels: by the names that `senet.ops.use` takes; the first that takes x is dispatched to.
    """

    def __init__(
        self,
        description: Description[A, Any, Any],
        *,
        reference: Callable[[A, Momenta], Tensor],
        algebra: Algebra,
        pytorch: Callable[[A, Momenta], Tensor] | None = None,
        kernels: Mapping[str, Kernels],
    ) -> None:
        self.description, self.reference = description, reference
        self.algebra, self.kernels, self.pytorch = algebra, kernels, pytorch
        self._arguments = _Fields(description.arguments, description.added)
        self._saved = _Fields(description.saved)
        names = self._arguments.names
        self._differentiated = [names.index(name) for name in description.gradients._fields]
        lists = self._arguments.lists
        self._gradient_lists = tuple(lists[i] for i in self._differentiated) if lists else ()
        self._flat_places = tuple(1 + i for i in self._differentiated)
        _OPERATORS[description.name] = self
        self._define()
        self._direct, self._dispatched, self._transparent = self._functions()
        self._register_gradients()
        self._register_flops()

    def run(self, implementation: str, arguments: A, momenta: Momenta) -> Tensor:
        """y, the running statistics among the arguments moved.

        Args:
            implementation: one that takes them: "reference", "pytorch", "algebra" or one of the
                kernels.
            arguments: of the operator.
            momenta: of its normalizations.
        """
        tensors, _ = self._arguments.split(arguments)
        traced = torch.jit.is_tracing()  # sizes are tensors then, and comparing them warns
        empty = not traced and tensors[0].numel() == 0
        if implementation == "reference" and not empty:
            return self.reference(arguments, momenta)
        if implementation == "pytorch" and self.pytorch is not None and not empty:
            return self.pytorch(arguments, momenta)
        if implementation not in self.kernels:
            outputs = self._by_algebra(arguments)
        elif not (traced or empty or torch.compiler.is_compiling()) and _unobserved(tensors):
            call = (self.kernels[implementation].module, arguments, momenta)
            y: Tensor = self._direct.apply(call, *tensors)
            return y
        else:
            outputs = self.description.outputs._make(_taken(self._operator(*arguments)))
        if not empty:
            self.description.move(arguments, outputs, momenta)
        return outputs.y

    def saved_by(self, node: Any, implementation: str) -> Any:
        """What `node`, a y.grad_fn, keeps if these kernels made y directly; otherwise None."""
        cls: Any = self._direct
        if not isinstance(node, cls._backward_cls):
            return None
        if node.module is not self.kernels[implementation].module:
            return None
        return self._saved.join(node.saved_tensors[: node.kept], node.options)

    def _by_algebra(self, arguments: A) -> Any:
        """Outputs; torch.compile cannot trace the function where no gradient is wanted."""
        tensors, options = self._arguments.split(arguments)
        if torch.compiler.is_compiling() and not differentiates(tensors):
            return self.algebra.forward(arguments)
        return self.description.outputs._make(self._transparent.apply(options, *tensors))

    def _wanted(self, flags: Sequence[bool]) -> Any:
        return self.description.gradients._make(_grouped(flags, self._gradient_lists))

    def _module(self, x: Tensor) -> Algebra | None:
        """The kernels that take x."""
        return next((k.module for k in self.kernels.values() if k.takes(x)), None)

    def _define(self) -> None:
        """Schemas, implementations and fake tensors."""
        d, arguments, saved = self.description, self._arguments, self._saved
        outputs = ", ".join(f"Tensor {name}" for name in d.outputs._fields)
        _LIBRARY.define(f"{d.name}({arguments.schema}) -> ({outputs})")
        _LIBRARY.define(
            f"{d.name}_backward(Tensor gradient, {saved.schema}, bool[] wanted) -> Tensor[]"
        )
        packet, backward_packet = d.name, f"{d.name}_backward"
        self._operator = getattr(torch.ops.senet, packet).default
        self._backward_operator = getattr(torch.ops.senet, backward_packet).default

        def chosen(gradients: Any, flags: Sequence[bool]) -> list[Tensor]:
            flat = _flat(gradients, self._gradient_lists)
            return [t for t, want in zip(flat, flags, strict=True) if want]

        def forward(*inputs: Any) -> Any:
            given = arguments.cls(*inputs)
            kernels = self._module(arguments.split(given)[0][0])
            if kernels is None:
                return _returned(self.algebra.forward(given))
            return _returned(kernels.forward(given, None))

        def backward(gradient: Tensor, *inputs: Any) -> list[Tensor]:
            *values, flags = inputs
            kept = saved.cls(*values)
            module = self._module(saved.split(kept)[0][0]) or self.algebra
            return chosen(module.backward(gradient, kept, self._wanted(flags)), flags)

        def fake(*inputs: Any) -> Any:
            return _returned(d.empty_outputs(arguments.cls(*inputs)))

        def fake_backward(_: Tensor, *inputs: Any) -> list[Tensor]:
            *values, flags = inputs
            return chosen(d.empty_gradients(saved.cls(*values), self._wanted(flags)), flags)

        for key in ("CompositeExplicitAutograd", "CUDA"):  # CUDA: also ROCm's tensors
            _LIBRARY.impl(packet, forward, key)
            _LIBRARY.impl(backward_packet, backward, key)
        torch.library.register_fake(f"senet::{packet}", fake, lib=_LIBRARY)
        torch.library.register_fake(f"senet::{backward_packet}", fake_backward, lib=_LIBRARY)

    def _functions(self) -> tuple[type[torch.autograd.Function], ...]:
        """Direct, dispatched, transparent: functions of what is no tensor, then of the tensors."""
        arguments, name = self._arguments.join, self.description.name
        keep, gradients, named = self._keep, self._gradients, self.description.outputs._make
        operator, by_dispatcher = self._operator, self._backward_by_dispatcher

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, call: Any, *tensors: Any) -> Any:
                del tensors  # the function's inputs for autograd; the arguments hold the same
                ctx.module, given, momenta = call
                outputs = ctx.module.forward(given, momenta)
                keep(ctx, given, outputs)
                return outputs.y

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Any:
                return gradients(ctx, ctx.module.backward, gradient)

        class Dispatched(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, options: Any, *tensors: Any) -> Any:
                given = arguments(tensors, options)
                with torch._C._AutoDispatchBelowAutograd():
                    outputs = named(_taken(operator(*given)))
                keep(ctx, given, outputs)
                ctx.mark_non_differentiable(*outputs[1:])
                ctx.set_materialize_grads(False)
                return outputs

            @staticmethod
            def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
                return gradients(ctx, by_dispatcher, gradient)

        class Transparent(torch.autograd.Function):
            # torch.compile looks through these functions. It finds the operator by its name: from
            # outside of them it takes `self` in no version, and bound methods not in 2.11.
            @staticmethod
            def forward(options: Any, *tensors: Any) -> Any:
                own = _OPERATORS[name]
                return own.algebra.forward(own._arguments.join(tensors, options))

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                own = _OPERATORS[name]
                outputs = own.description.outputs._make(output)
                own._keep(ctx, own._arguments.join(inputs[1:], inputs[0]), outputs)
                ctx.mark_non_differentiable(*output[1:])
                ctx.set_materialize_grads(False)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor | None, *_: None) -> Any:
                own = _OPERATORS[name]
                return own._gradients(ctx, own.algebra.backward, gradient)

        return Direct, Dispatched, Transparent

    def _keep(self, ctx: Any, arguments: A, outputs: Any) -> None:
        """Keep for the backward pass what the description says."""
        tensors, ctx.options = self._saved.split(self.description.save(arguments, outputs))
        ctx.given = arguments[self._arguments.count :]
        ctx.kept = len(tensors)
        ctx.save_for_backward(*tensors, *self.description.save_again(arguments))
        ctx.passes = self.description.passes(arguments)

    def _gradients(
        self, ctx: Any, backward: Callable[..., Any], gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a function's inputs for that of y."""
        needs = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(needs)
        if gradient is None:
            return tuple(result)
        places = self._places(len(needs))
        flags = [needs[i] for i in places]
        if ctx.passes is not None and flags[ctx.passes]:
            flags[ctx.passes] = False
            result[places[ctx.passes]] = gradient
        if any(flags):
            tensors = ctx.saved_tensors
            saved = self._saved.join(tensors[: ctx.kept], ctx.options)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                again = self.description.again(saved, tensors[ctx.kept :], ctx.given, gradient)
                values: Sequence[Any] = self._differentiable(again, places, flags)
            else:
                found = backward(gradient, saved, self._wanted(flags))
                values = _flat(found, self._gradient_lists)
            for place, want, value in zip(places, flags, values, strict=True):
                if want:
                    result[place] = value
        return tuple(result)

    def _differentiable(
        self, again: Again, places: Sequence[int], flags: Sequence[bool]
    ) -> list[Tensor | None]:
        """The wanted gradients by the reference, as functions of all that they depend on."""
        tensors, options = self._arguments.split(again.arguments)
        # Each argument a tensor of its own, though the caller may have given one tensor twice.
        tensors = tuple(t.view_as(t) if isinstance(t, Tensor) else t for t in tensors)
        names = self.description.gradients._fields if again.known else ()
        known = {names.index(name): value for name, value in again.known.items()}
        wanted = [i for i, want in enumerate(flags) if want and i not in known]
        values: list[Tensor | None] = [known.get(i) for i in range(len(flags))]
        if wanted:
            y = self.reference(self._arguments.join(tensors, options), again.momenta)
            sources = [tensors[places[i] - 1] for i in wanted]
            found = torch.autograd.grad(
                y, sources, again.gradient, create_graph=True, allow_unused=True
            )
            for i, value in zip(wanted, found, strict=True):
                values[i] = value
        return values

    def _places(self, inputs: int) -> Sequence[int]:
        """Where among a function's inputs those stand that are differentiated."""
        lists = self._arguments.lists
        if not lists:
            return self._flat_places
        places = _grouped(range(1, inputs), lists)
        return _flat([places[i] for i in self._differentiated], self._gradient_lists)

    def _backward_by_dispatcher(self, gradient: Tensor, saved: Any, wanted: Any) -> Any:
        flags = _flat(wanted, self._gradient_lists)
        found = iter(self._backward_operator(gradient, *saved, flags))
        return _grouped([next(found) if want else None for want in flags], self._gradient_lists)

    def _register_gradients(self) -> None:
        """What the dispatcher does above the implementations: autograd and autocast."""
        arguments, saved = self._arguments, self._saved
        operator, backward_operator = self._operator, self._backward_operator
        dispatched = self._dispatched

        class NoDoubleBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, options: Any, gradient: Tensor, *tensors: Any) -> Any:
                del ctx
                kept = _grouped(tensors, saved.lists)
                with torch._C._AutoDispatchBelowAutograd():
                    return tuple(backward_operator(gradient, *kept, *options))

            @staticmethod
            def backward(ctx: Any, *_: Any) -> None:
                raise RuntimeError(NO_DOUBLE_BACKWARD)

        def forward(*inputs: Any) -> Any:
            tensors, options = arguments.split(inputs)
            if differentiates(tensors):
                return _returned(dispatched.apply(options, *tensors))
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs)

        def backward(gradient: Tensor, *inputs: Any) -> Any:
            tensors, options = saved.split(inputs)
            if differentiates((gradient, *tensors)):
                return list(NoDoubleBackward.apply(options, gradient, *tensors))
            with torch._C._AutoDispatchBelowAutograd():
                return backward_operator(gradient, *inputs)

        for target, above in ((operator, forward), (backward_operator, backward)):
            name = target._schema.name.removeprefix("senet::")
            _LIBRARY.impl(name, above, "Autograd")
            for key in ("AutocastCPU", "AutocastCUDA"):
                _LIBRARY.impl(name, _without_autocast(target, key), key)

    def _register_flops(self) -> None:
        d, saved = self.description, self._saved

        def flops(*shapes: Any, **_: Any) -> int:
            return d.flops(d.arguments(*shapes))

        def backward_flops(_: Any, *shapes: Any, **__: Any) -> int:
            return d.backward_flops(saved.cls(*shapes[:-1]), self._wanted(shapes[-1]))

        register_flop_formula(self._operator.overloadpacket)(flops)
        register_flop_formula(self._backward_operator.overloadpacket)(backward_flops)


def _without_autocast(operator: Any, key: str) -> Callable[..., Any]:
    """Inputs keep their types under autocast: sums and the gate are in float32 whatever x is."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*arguments)

    return call
