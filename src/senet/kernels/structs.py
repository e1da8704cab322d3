"""What Python and the C++ kernels share: the structures and enumerations of the headers here.

The library exports its own description of each, which `differing_field` compares with these.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from enum import IntEnum

_TYPES = {ctypes.c_int64: "q", ctypes.c_double: "d", ctypes.c_void_p: "P"}


class Gate(IntEnum):
    """The function that ends an excitation."""

    SIGMOID = 0
    TANH = 1
    RELU = 2
    HARD_SIGMOID = 3
    IDENTITY_SIGMOID = 4


class Normalization(IntEnum):
    """Where a normalization's statistics come from."""

    NONE = 0
    RUNNING = 1
    BATCH = 2
    GIVEN = 3


class Shortcut(IntEnum):
    """What a tail adds."""

    NONE = 0
    PLAIN = 1
    NORMALIZED = 2


class Elementwise(IntEnum):
    """An activation of the operator: of a tail, a join's branches, or a gate's hidden layer."""

    LINEAR = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4
    GELU = 5
    LEAKY_RELU = 6


class Kind(IntEnum):
    """What a step does."""

    INPUT = 0
    CONVOLUTION = 1
    WINOGRAD = 2
    WINOGRAD_INPUT = 3
    WINOGRAD_PRODUCT = 4
    DEPTHWISE = 5
    MAX_POOL = 6
    AVERAGE_POOL = 7
    SUMS = 8
    MEANS = 9
    POINTWISE = 10
    EXCITATION = 11
    IMAGES = 12
    GROUPED = 13
    CHAIN = 14
    SLIDING = 15
    PAIRED = 16


class Activation(IntEnum):
    """What a step ends with, by the names of `senet.ops.activations`.

    PRELU has its slopes beside it, and IDENTITY_SIGMOID, a gate, is twice a sigmoid.
    """

    LINEAR = 0
    RELU = 1
    RELU6 = 2
    LEAKY_RELU = 3
    PRELU = 4
    ELU = 5
    SILU = 6
    HARDSWISH = 7
    MISH = 8
    GELU = 9
    GELU_TANH = 10
    SIGMOID = 11
    HARDSIGMOID = 12
    TANH = 13
    IDENTITY_SIGMOID = 14


class Limit(IntEnum):
    """CHANNELS: of a map that is read beyond its edges."""

    CHANNELS = 8192


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class NormArguments(ctypes.Structure):
    """A batch norm's parameters and statistics, `operator/arguments.h`."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "weight bias running_mean running_var"),
        *_fields(ctypes.c_double, "eps momentum"),
    )


class TailArguments(ctypes.Structure):
    """Arguments of tail_forward and tail_backward, `operator/arguments.h`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "N C P H channels_last threads gate activation"),
        *_fields(ctypes.c_int64, "normalization shortcut_kind"),
        *_fields(ctypes.c_double, "negative_slope"),
        *_fields(NormArguments, "norm shortcut_norm"),
        *_fields(ctypes.c_void_p, "x shortcut w1 b1 w2 b2 y statistics squeezed hidden gates"),
        *_fields(ctypes.c_void_p, "gradient dx dshortcut dweight dbias"),
        *_fields(ctypes.c_void_p, "dshortcut_weight dshortcut_bias dw1 db1 dw2 db2"),
    )


class JoinBranch(ctypes.Structure):
    """One input of a join, `operator/arguments.h`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "C normalization"),
        *_fields(NormArguments, "norm"),
        *_fields(ctypes.c_void_p, "x dx dweight dbias"),
    )


class JoinArguments(ctypes.Structure):
    """Arguments of join_forward and join_backward, `operator/arguments.h`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "N C P H branches channels_last threads gate"),
        *_fields(ctypes.c_int64, "activation hidden_activation"),
        *_fields(ctypes.c_double, "negative_slope"),
        *_fields(ctypes.c_void_p, "w1 b1 w2 b2 y statistics squeezed hidden gates"),
        *_fields(ctypes.c_void_p, "gradient dw1 db1 dw2 db2"),
    )


class DepthwiseArguments(ctypes.Structure):
    """Arguments of depthwise_forward and depthwise_backward, `operator/arguments.h`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "N C H W OH OW kernel stride padding threads"),
        *_fields(ctypes.c_void_p, "x weights y packed gradient dx dweights"),
    )


class Step(ctypes.Structure):
    """One step of a program, `inference/step.h`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "kind"),
        *_fields(
            ctypes.c_void_p, "x weights bias gates shortcut slopes input_gates y patches sums"
        ),
        *_fields(
            ctypes.c_int64, "x_ld weights_ld y_ld gates_ld shortcut_ld sums_ld input_gates_ld"
        ),
        *_fields(ctypes.c_int64, "N H W C OH OW OC"),
        *_fields(ctypes.c_int64, "kernel_h kernel_w stride_h stride_w pad_h pad_w"),
        *_fields(ctypes.c_int64, "dilation_h dilation_w groups activation"),
        *_fields(ctypes.c_double, "parameter"),
        *_fields(
            ctypes.c_int64,
            "rows panels tiles images sum_blocks steps parts lines counts_padding tile",
        ),
        *_fields(ctypes.c_int64 * 4, "strides"),
    )


class ConvolutionArguments(ctypes.Structure):
    """Arguments of the convolution kernels, `convolution/arguments.h`."""

    _fields_ = (
        *_fields(ctypes.c_int64, "N H W C OH OW K pad_h pad_w kernel stride groups threads"),
        *_fields(ctypes.c_void_p, "x weights y"),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    NormArguments,
    TailArguments,
    JoinBranch,
    JoinArguments,
    DepthwiseArguments,
    Step,
    ConvolutionArguments,
)
ENUMERATIONS: tuple[type[IntEnum], ...] = (
    Gate,
    Normalization,
    Shortcut,
    Elementwise,
    Kind,
    Activation,
    Limit,
)


def packer(structure: type[ctypes.Structure]) -> struct.Struct:
    """Packs a structure's fields, those of structures within it in their place, in one call."""

    def letters(structure: type[ctypes.Structure]) -> str:
        kinds = (kind for _, kind, *_ in structure._fields_)
        return "".join(
            letters(kind) if issubclass(kind, ctypes.Structure) else _TYPES[kind].replace("P", "q")
            for kind in kinds
        )

    packed = struct.Struct("=" + letters(structure))
    assert packed.size == ctypes.sizeof(structure)
    return packed


class _Field(ctypes.Structure):
    _fields_ = (
        ("structure", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        *_fields(ctypes.c_int64, "type offset size"),
    )


class _Constant(ctypes.Structure):
    _fields_ = (
        ("enumeration", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("value", ctypes.c_int64),
    )


def _own_description() -> Iterator[str]:
    for structure in STRUCTURES:
        for name, kind, *_ in structure._fields_:
            place = getattr(structure, name)
            yield _field(structure.__name__, name, _TYPES.get(kind, "s"), place.offset, place.size)
    for enumeration in ENUMERATIONS:
        for constant in enumeration:
            yield f"{enumeration.__name__}.{constant.name} = {constant.value}"


def _field(structure: str, name: str, letter: str, offset: int, size: int) -> str:
    return f"{structure}.{name} ({size} bytes at {offset}, type {letter})"


def _description(library: ctypes.CDLL) -> Iterator[str]:
    library.senet_field.restype = ctypes.POINTER(_Field)
    library.senet_constant.restype = ctypes.POINTER(_Constant)
    index = ctypes.c_int64(0)
    while found := library.senet_field(index):
        field = found.contents
        names = (field.structure.decode(), field.name.decode())
        yield _field(*names, chr(field.type), field.offset, field.size)
        index.value += 1
    index = ctypes.c_int64(0)
    while found := library.senet_constant(index):
        constant = found.contents
        yield f"{constant.enumeration.decode()}.{constant.name.decode()} = {constant.value}"
        index.value += 1


def differing_field(library: ctypes.CDLL) -> str:
    """The first field or constant that the library describes differently, in words; "" if none."""
    if not hasattr(library, "senet_field"):
        return "it does not describe its fields"
    own, found = list(_own_description()), list(_description(library))
    for mine, theirs in zip(own, found, strict=False):
        if mine != theirs:
            return f"it has {theirs} where Python has {mine}"
    if len(own) != len(found):
        return f"it describes {len(found)} fields and constants where Python has {len(own)}"
    return ""
