"""What flags say, as values."""

from collections.abc import Sequence
from typing import Any

from cyclopts import Token

# The first that is too large for a tensor's size, an index or a seed.
_END = 1 << 63


def _checked(number: int) -> int:
    if not -_END <= number < _END:
        raise ValueError(f"must be below 2^63, got a number of {number.bit_length()} bits")
    return number


def whole(_type: Any, tokens: Sequence[Token]) -> int:
    """A whole number; unlike cyclopts' own conversion, 1.5 is refused and not rounded."""
    try:
        number = int(tokens[0].value)
    except ValueError:
        raise ValueError(f"must be a whole number, got {tokens[0].value[:40]!r}") from None
    return _checked(number)


def whole_numbers(_type: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """Whole numbers separated by commas (`3,32,32`), or a TOML array of them."""
    values = [part.strip() for token in tokens for part in token.value.split(",")]
    try:
        numbers = tuple(int(value) for value in values)
    except ValueError:
        raise ValueError(f"must be whole numbers like 2,3, got {','.join(values)!r}") from None
    return tuple(map(_checked, numbers))


def names(_type: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Names separated by commas, or a TOML array of them."""
    return tuple(part.strip() for token in tokens for part in token.value.split(","))


def switch(_type: Any, tokens: Sequence[Token]) -> bool:
    """A flag without a value on the command line, true or false in a file."""
    value = tokens[0].value or str(tokens[0].implicit_value)
    if value.lower() not in ("true", "false"):
        raise ValueError(f"must be true or false, got {value!r}")
    return value.lower() == "true"
