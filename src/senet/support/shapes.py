"""Shapes in signatures, `Float[Tensor, "N C H W"]`, for readers and the type checker's jaxtyping.

What runs needs no jaxtyping: there it is `Tensor`, which torch.fx can write into the code it makes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
else:

    class Float:
        """An array of floating-point numbers."""

        def __class_getitem__(cls, described: tuple[type, str]) -> type:
            kind, _ = described
            return kind

    class Int(Float):
        """An array of integers."""

    class Bool(Float):
        """An array of booleans."""
