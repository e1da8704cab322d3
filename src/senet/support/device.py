"""Choosing the device that a command runs on."""

import torch

from senet.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of that name, "auto" being a GPU where there is one.

    Raises:
        UserError: another name than "auto", "cpu", "cuda" and "mps", or it is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(key for key, here in available.items() if here)
    if name not in available:
        raise UserError(f"device must be one of auto, {', '.join(available)}, got {name!r}")
    if not available[name]:
        raise UserError(f"device {name!r} is not available here; use 'cpu' or 'auto'")
    return torch.device(name)
