"""Images and labels of a batch, in the forms that loaders give them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from senet.errors import UserError

_IMAGES = ("pixel_values", "image", "images", "img", "x", "inputs", "input")
_LABELS = ("labels", "label", "target", "targets", "y", "class")


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and class numbers of a batch; None for a batch without class numbers.

    Args:
        batch: images; (images, labels, …); or a dict, as of Hugging Face, with one of the usual
            names for each.

    Raises:
        UserError: it holds no images under a known name.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGES if key in batch), None)
        labels = next((batch[key] for key in _LABELS if key in batch), None)
        if not isinstance(images, Tensor):
            raise UserError(
                f"a batch has the keys {', '.join(map(str, batch))}: its images must be a tensor "
                f"named {', '.join(_IMAGES[:3])}"
            )
        return images, labels
    return batch[0], batch[1] if len(batch) > 1 else None
