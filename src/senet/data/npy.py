"""Images in NumPy's own file format, read without unpickling."""

import io
import math
import tokenize
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from senet.data.arrays import Header, Stored, channels_first, check_size, depth_of, split_shape

MAGIC = b"\x93NUMPY"
ENDING = ".npy"


class _Form(NamedTuple):
    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype[Any]
    header: Header


def npy_header(file: IO[bytes]) -> Header:
    """What a .npy file says of its image.

    Raises:
        ValueError: it is damaged, holds objects, or is no image.
    """
    return _form(file).header


def read_npy(data: bytes) -> Stored:
    """The image of a .npy file: (H,W), (H,W,C) or (C,H,W), see `channel_axis`.

    The array is a view of the file's bytes where it needs no conversion.

    Raises:
        ValueError: it is damaged, cut short, holds objects, or is no image.
    """
    file = io.BytesIO(data)
    shape, columns_first, dtype, _ = _form(file)
    count = math.prod(shape)
    if len(data) - file.tell() != count * dtype.itemsize:
        raise ValueError("it is cut short, or longer than its header says")
    flat = np.frombuffer(data, dtype, count, file.tell())
    return Stored(channels_first(flat.reshape(shape, order="F" if columns_first else "C")))


def _form(file: IO[bytes]) -> _Form:
    version = npy_format.read_magic(file)
    readers: Any = {
        (1, 0): npy_format.read_array_header_1_0,
        (2, 0): npy_format.read_array_header_2_0,
    }
    if version not in readers:  # 3.0 is for names of fields alone
        raise ValueError(f"an array in version {version} of the format is no image")
    try:
        shape, columns_first, dtype = readers[version](file)
    except (tokenize.TokenError, RecursionError, MemoryError) as error:  # of a damaged literal
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"an array of shape {shape} is no image: (H,W), (H,W,C) or (C,H,W)")
    height, width, channels = split_shape(shape)
    check_size(width, height, channels * dtype.itemsize)
    return _Form(shape, columns_first, dtype, Header(channels, depth_of(dtype), (width, height)))
